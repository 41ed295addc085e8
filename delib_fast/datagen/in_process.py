"""A model in this process as a backend: no server, no network; the same ledger and the same pipelines.

What it needs of a model and a tokenizer is what `delib_fast.models` gives: `generate` and a chat template. Requests
that wait together are generated together, padded on the left. Each batch is seeded by its requests' ids, so a
batch of the same requests answers the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from delib_fast.config import ModelConfig
from delib_fast.datagen.request_log import Answer, Request
from delib_fast.datagen.settings import EndpointSettings

_GATHER_S = 0.02  # how long the first request of a batch waits for others


class TransformersBackend:
    def __init__(self, settings: EndpointSettings) -> None:
        from delib_fast.models import build_model, load_tokenizer  # the only way to transformers

        self._tokenizer: Any = load_tokenizer(settings.model)
        self._tokenizer.padding_side = "left"  # as an argument of apply_chat_template it is passed over in silence
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        model: Any = build_model(ModelConfig(path=settings.model), self._tokenizer, dtype=dtype)
        self._model = model.to(self._device).eval()
        self._batch = settings.concurrency
        self._limit = settings.token_limit_name
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._loop: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Answer:
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        return await done

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _serve(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._batch:
                await asyncio.sleep(_GATHER_S)
            batch, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            requests = [request for request, _ in batch]
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, requests)
            except Exception as error:  # noqa: BLE001 (each waiting request is told)
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (_, done), answer in zip(batch, answers, strict=True):
                if not done.done():
                    done.set_result(answer)

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[Answer]:
        params, tokenizer = requests[0].params, self._tokenizer  # one endpoint: its parameters are all alike
        inputs = tokenizer.apply_chat_template(
            [list(request.messages) for request in requests],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        ).to(self._device)
        length, limit = inputs["input_ids"].shape[1], params[self._limit]
        sampling = {"do_sample": True, "temperature": params["temperature"], "top_p": params["top_p"], "top_k": 0}
        with torch.random.fork_rng(devices=[0] if self._device == "cuda" else []):
            torch.manual_seed(int(requests[0].id[:12], 16))
            made = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=limit,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                **(sampling if params["temperature"] > 0 else {"do_sample": False}),
            )
        ends = self._ends()
        return [
            self._answer(row[length:].tolist(), ends, int(mask.sum()), limit)
            for row, mask in zip(made, inputs["attention_mask"], strict=True)
        ]

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def _answer(self, ids: list[int], ends: set[int], prompt_tokens: int, limit: int) -> Answer:
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        # The control tokens of the chat stand after the end; <think> is one too, and is kept as text.
        text = self._tokenizer.decode(ids[:stop], skip_special_tokens=False)
        return Answer(
            text=text,
            finish="length" if stop is None and len(ids) >= limit else "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(ids) if stop is None else stop + 1,
            served_by="in process",
        )
