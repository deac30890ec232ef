"""Sixty-four clients at once for a minute, against the real process.

    python -m pytest -m slow -s tests/server/test_load.py

The variable MSQUANT_SERVE_MODEL names another model folder than the tiny one.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

CLIENTS = 64
SECONDS = 60
# Between two pieces of one client's text.
LONGEST_GAP = 30.0


async def listen(client: openai.AsyncOpenAI, model: str, seed: int, until: float) -> tuple[int, float]:
    """Stream until a time; returns how many pieces came and the longest time without one."""
    pieces, gap, last = 0, 0.0, time.monotonic()
    while time.monotonic() < until:
        stream = await client.completions.create(
            model=model,
            prompt=f"The number {seed}",
            max_tokens=2000,
            seed=seed,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            now = time.monotonic()
            pieces, gap, last = pieces + 1, max(gap, now - last), now
            if now >= until:
                break
        await stream.close()
    return pieces, gap


async def one_too_many(client: openai.AsyncOpenAI, model: str, url: str, until: float) -> int:
    """Ask once a second, when all places are taken; returns how often it was refused."""
    refused = 0
    async with httpx.AsyncClient(trust_env=False) as plain:
        while time.monotonic() < until - 5:
            await asyncio.sleep(1)
            health = (await plain.get(f"{url}/health", timeout=30)).json()
            if health["active_requests"] < CLIENTS:
                continue
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model=model, prompt="I am", max_tokens=1)
            refused += 1
    return refused


@pytest.mark.slow
def test_sixty_four_clients_for_a_minute(chat_model: Path, tmp_path: Path) -> None:
    folder = Path(os.environ.get("MSQUANT_SERVE_MODEL", tmp_path / "long"))
    if not folder.exists():
        shutil.copytree(chat_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    # Nobody reads the log while the clients are served.
    options = ["--port", "0", "--json", "--no-access-log", "--max-requests", str(CLIENTS)]
    command = [sys.executable, "-m", "msquant", "serve", "--model", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        files = Path(f"/proc/{process.pid}/fd")
        open_before = len(list(files.iterdir()))

        async def clients() -> tuple[list[tuple[int, float]], int]:
            client = openai.AsyncOpenAI(
                base_url=f"{ready['url']}/v1", api_key="none", max_retries=0, timeout=LONGEST_GAP
            )
            until = time.monotonic() + SECONDS
            async with client:
                *listened, refused = await asyncio.gather(
                    *(listen(client, ready["model"], seed, until) for seed in range(CLIENTS)),
                    one_too_many(client, ready["model"], ready["url"], until),
                )
            return listened, refused

        listened, refused = asyncio.run(clients())
        pieces, gaps = zip(*listened, strict=True)
        measured = f"{sum(pieces)} pieces, longest gap {max(gaps):.2f} s, {refused} refused"
        sys.stderr.write(f"{measured}\n")
        assert min(pieces) > 5
        assert max(gaps) < LONGEST_GAP
        assert refused > 5
        deadline = time.monotonic() + 30
        while httpx.get(f"{ready['url']}/health", trust_env=False).json()["active_requests"]:
            assert time.monotonic() < deadline
        time.sleep(1)
        assert len(list(files.iterdir())) <= open_before + 1
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
