"""Files, lines and classes of this repository that one text request passes, from the HTTP body to the response.

`python -m benchmarks.gateway.request_path` serves MiniLM with a profile hook in the gateway and in the model, sends a
request a few times, and counts the files in which a function ran each time, their lines, and the classes they define.
The supervisor of the processes is left out: it runs at the same time, but not for the request.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("gateway", "python_backend", "kernels", "model_repository")
SUPERVISOR = {"supervisor.py", "triton_process.py"}
REQUESTS = 5
PAUSE_SECONDS = 0.1  # the hook looks for the file `now` every 0.01 s
# Runs in the gateway as sitecustomize.py and in the model before its model.py. Triton calls `execute` on a thread that
# Python did not start, which therefore has no hook.
HOOK = """
import json, os, sys, threading, time

def _hook_calls(folder=os.environ["REQUEST_PATH"]):
    requests, current = {}, None

    def hook(frame, event, _):
        if event == "call" and current is not None:
            current.add(frame.f_code.co_filename)

    def watch():
        nonlocal current
        while True:
            serve = sys.modules.get("triton_embed.python_backend.serve")
            server = getattr(serve, "EmbeddingServer", None)
            if server is not None and not hasattr(server, "unhooked"):
                execute = server.unhooked = server.execute
                server.execute = lambda self, requests: (sys.setprofile(hook), execute(self, requests))[1]
            try:
                name = open(os.path.join(folder, "now")).read()
            except OSError:
                name = ""
            if name and name not in requests:
                requests[name] = current = set()
            elif not name and current is not None:
                current = None
                with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
                    json.dump({key: sorted(files) for key, files in requests.items()}, file)
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    threading.setprofile(hook)
    sys.setprofile(hook)

_hook_calls()
"""


def post(port: int) -> None:
    """Embed a text that no cache knows."""
    body = json.dumps({"input": f"one text {time.time()}"}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body)) as response:
        response.read()


def files_passed(root: Path, port: int) -> list[Path]:
    """Serve the checkout at `root` and return its files in which a function ran for every request."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(HOOK)
        shutil.copytree(root / "model_repository", folder / "models")
        model = folder / "models" / "minilm" / "1" / "model.py"
        model.write_text(HOOK + model.read_text())
        command = [root / ".venv" / "bin" / "triton-embed", "serve", f"--port={port}", "--model=minilm"]
        environment = {**os.environ, "PYTHONPATH": name, "REQUEST_PATH": name}
        server = subprocess.Popen([*command, f"--model-repository={folder / 'models'}"], env=environment, cwd=root)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                try:
                    post(port)
                    break
                except OSError:
                    time.sleep(0.5)
            for i in range(REQUESTS):
                (folder / "now").write_text(str(i))
                time.sleep(PAUSE_SECONDS)
                post(port)
                time.sleep(PAUSE_SECONDS)
                (folder / "now").unlink()
                time.sleep(PAUSE_SECONDS)
        finally:
            server.terminate()
            server.wait(60)
        passed: set[Path] = set()
        for record in folder.glob("*.json"):
            in_every_request = set.intersection(*map(set, json.loads(record.read_text()).values()))
            passed |= {Path(file).resolve() for file in in_every_request if Path(file).exists()}
    ours = [root.resolve() / folder for folder in FOLDERS]
    return sorted(f for f in passed if f.name not in SUPERVISOR and any(f.is_relative_to(folder) for folder in ours))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to serve (%(default)s)")
    parser.add_argument("--port", type=int, default=30555)
    options = parser.parse_args()
    totals = [0, 0]
    files = files_passed(options.root, options.port)
    for file in files:
        source = file.read_text()
        lines = len(source.splitlines())
        classes = sum(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(source)))
        totals = [totals[0] + lines, totals[1] + classes]
        print(f"{lines:>5} lines {classes:>3} classes  {file.relative_to(options.root.resolve())}")
    print(f"{len(files)} files, {totals[0]} lines, {totals[1]} classes")


if __name__ == "__main__":
    main()
