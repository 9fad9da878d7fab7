"""Which worker gets a request: without I/O, so that Triton, `kelp router` and the simulator run the same code.

Path in: `selector` chooses, remembers and learns; `choosing` asks for costs (`costs`, from `load`, `fleet` and
`timing.rates`) and a policy (`policies`). Knows neither sockets nor streams.
"""
