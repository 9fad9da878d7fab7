"""What only pays on a device that runs beside the host: graphs, and results that come later."""
