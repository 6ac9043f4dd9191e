"""textgen_serve: what `scripts/serve.py` is made of. Starts and stops the stock tritonserver; knows nothing of engines.

runtime.py       which tritonserver, its backend folder and environment
checkpoint.py    is this folder a model that can be served, does it fit
demo_model.py    puts SmolLM2-135M-Instruct on disk
options.py       command line flags from the engine's table of options
shared_memory.py names, locks and cleans the server's /dev/shm regions
processes.py     the tree of processes below a server, by role
server.py        one tritonserver: start, watch, stop
log.py           what the server's log says: stage, warnings, the reason of a failure
probe.py         readiness by a real request; the demonstration chat
"""
