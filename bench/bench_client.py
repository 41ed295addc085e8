"""Requests per second of the data generation client against a loopback server, with its request log and fsync.

    python -m pytest bench/bench_client.py --benchmark-only -q

The peer is the `openai` package's own client under a semaphore, which does not store its replies. `extra_info` has the
most that the server's delay and the concurrency allow. The server is another process on this machine, so on two cores
it occupies one of them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest
from harness import round_seconds
from pytest_benchmark.fixture import BenchmarkFixture

openai = pytest.importorskip("openai", reason="generation needs the openai package (extra `generate`)")

from delib_fast.datagen.backends import Secrets  # noqa: E402
from delib_fast.datagen.client import Client, for_each  # noqa: E402
from delib_fast.datagen.progress import Meter  # noqa: E402
from delib_fast.datagen.request_log import RequestLog  # noqa: E402
from delib_fast.datagen.settings import EndpointSettings  # noqa: E402

_REQUESTS = 200 if os.environ.get("DELIB_FAST_BENCH") == "quick" else 1000
_SYSTEM = "A spec of some length, as the context of every request. " * 100  # 5.6 kB: a system prompt with a spec


def chat(i: int) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": f"prompt {i} " * 20})


@pytest.fixture(params=[0, 100], ids=lambda ms: f"delay_{ms}ms")
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, float]]:
    script = Path(__file__).parent / "experiments" / "loopback_server.py"
    command = [sys.executable, str(script), str(request.param)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1", request.param / 1000
    server.communicate()


async def with_request_log(url: str, concurrency: int, folder: Path) -> int:
    settings = EndpointSettings.model_validate({"model": "loopback", "base_url": url, "concurrency": concurrency})
    folder.mkdir(parents=True)
    log = RequestLog(folder / "requests.jsonl")
    client = Client(log, Meter(log), Secrets())
    endpoint = client.endpoint(settings)
    async with client.running():
        await for_each(
            range(_REQUESTS), lambda i: endpoint.ask(chat(i), purpose="p"), client, concurrency=2 * concurrency
        )
    log.close()
    return len(RequestLog(folder / "requests.jsonl"))


async def plain_openai(url: str, concurrency: int, _: Path) -> int:
    slots = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def one(i: int) -> int:
            async with slots:
                reply = await client.chat.completions.create(model="loopback", messages=list(chat(i)), temperature=1.0)
                return len(reply.choices)

        return sum(await asyncio.gather(*map(one, range(_REQUESTS))))


@pytest.mark.parametrize("concurrency", [16, 64])
@pytest.mark.parametrize("backend", [with_request_log, plain_openai], ids=lambda f: f.__name__)
def bench_client(
    benchmark: BenchmarkFixture,
    served: tuple[str, float],
    backend: Callable[[str, int, Path], Coroutine[None, None, int]],
    concurrency: int,
    tmp_path: Path,
) -> None:
    url, delay_s = served
    rounds = itertools.count()  # each round writes to a new folder

    def once() -> None:
        assert asyncio.run(backend(url, concurrency, tmp_path / str(next(rounds)))) == _REQUESTS

    benchmark.pedantic(once, rounds=3, warmup_rounds=1)
    rate = _REQUESTS / statistics.median(round_seconds(benchmark))
    benchmark.extra_info |= {
        "requests": _REQUESTS,
        "concurrency": concurrency,
        "delay_s": delay_s,
        "requests_per_s": round(rate, 1),
        "ceiling_requests_per_s": round(concurrency / delay_s, 1) if delay_s else None,
        "openai": openai.__version__,
        "cores": os.cpu_count(),
    }
    print(f"\n{backend.__name__} concurrency {concurrency} delay {delay_s * 1000:.0f} ms: {rate:.0f} requests/s")
