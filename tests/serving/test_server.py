"""The HTTP server as users start it, compiled layers and all: many clients at once, clients that go away."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served_models import Generated, prompts, save_moba, text, tokens

from openmoba import MobaConfig

START = 400
"""Seconds that the server may take."""


class Server:
    """A running server and its address."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.name = log, str(folder)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.name]
        options = ["--dtype", "float32", "--max-model-len", "1024", "--block-size", "32"]
        options += ["--max-num-batched-tokens", "128", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *options],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        for _ in range(2 * START):
            if self.process.poll() is not None:
                break
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def ask(self, prompt: list[int], count: int, **options: Any) -> Any:
        """Open a request for greedy tokens; the answer is read by the caller."""
        body = {"model": self.name, "prompt": text(prompt), "max_tokens": count, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body | options).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)

    def complete(self, prompt: list[int], count: int) -> list[int]:
        with self.ask(prompt, count) as answer:
            return tokens(json.load(answer)["choices"][0]["text"])

    def abandon(self, prompt: list[int], count: int) -> None:
        """Read a few tokens of an answer, and go away."""
        with self.ask(prompt, count, stream=True) as answer:
            for _ in range(3):
                assert answer.readline().startswith(b"data:")
                answer.readline()

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture(scope="module")
def folder(full: Path) -> Path:
    return save_moba(full, MobaConfig(block_size=16, top_k=3, full_layers=(1,)))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(folder, tmp_path_factory.mktemp("server") / "log")
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)


def test_many_clients(server: Server, folder: Path, generated: Generated) -> None:
    """Some share a prefix, two go away, one asks for too much; all others get what `openmoba generate` gives."""
    assert "MoBA with blocks of 16 tokens, top-3, layers [1] full" in server.log.read_text()
    first, tail, short, left, long = prompts(260, 30, 7, 120, 1025, seed=9)
    asked = [first, first[:192] + tail, short, first + tail]
    with ThreadPoolExecutor(8) as clients:
        going = [clients.submit(server.abandon, left[:100], 500), clients.submit(server.abandon, left, 500)]
        answers = list(clients.map(lambda prompt: server.complete(prompt, 32), asked))
        for client in going:
            client.result()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.ask(long, 1)
    assert server.complete(first, 32) == answers[0]
    assert answers == [generated(folder, prompt, 32) for prompt in asked]
    assert server.metric("vllm:prefix_cache_hits_total") >= 256
    for _ in range(100):
        if server.metric("vllm:num_requests_running") == 0:
            break
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0, "requests of clients that went away are over"
    assert server.metric("vllm:generation_tokens_total") < 1000
