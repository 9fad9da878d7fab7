"""Where KV lies below a worker's own pool: host memory, local disk, object store."""
