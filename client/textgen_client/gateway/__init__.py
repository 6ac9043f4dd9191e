"""The HTTP edge: Text Generation Inference's routes and OpenAI's routes, in front of Triton's gRPC port.

Rooms: settings (what can be set), app (the application and its order of layers), access (keys, sizes, ids, log),
errors (statuses and bodies), sse (streams and clients that leave), backend (what of Triton the routes use), tgi and
openai (one dialect each). Needs the extra `gateway` of this distribution.
"""
