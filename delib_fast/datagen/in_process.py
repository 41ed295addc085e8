"""The backend for a model in this process. It needs no server, and uses the same request log and pipelines.

Requests that are waiting at the same time form one batch, padded on the left. Each batch is seeded with the id of its
first request, so a batch of the same requests has the same answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from delib_fast.config import ModelConfig
from delib_fast.datagen.answers import Answer, Request
from delib_fast.datagen.settings import EndpointSettings

_GATHER_S = 0.02  # how long the first request of a batch waits for others


class TransformersBackend:
    """A Hugging Face model on the GPU or the CPU, in bf16 if that computes it natively, else in fp32."""

    resumable = False

    def __init__(self, settings: EndpointSettings) -> None:
        from delib_fast.models import build_model, load_tokenizer  # imports transformers, which takes seconds
        from delib_fast.models.precision import native_precision

        self._tokenizer: Any = load_tokenizer(settings.model)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = native_precision(torch.device(self._device))
        model: Any = build_model(ModelConfig(path=settings.model), self._tokenizer, dtype=dtype)
        self._model = model.to(self._device).eval()
        self._batch_size = settings.concurrency
        self._limit_name = settings.token_limit_name
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._serving: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Answer:
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await done

    async def close(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _serve(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._batch_size:
                await asyncio.sleep(_GATHER_S)
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            requests = [request for request, _ in batch]
            fault: Exception = RuntimeError("the model gave no answer")  # for every request that is left without one
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, requests)
                for (_, done), answer in zip(batch, answers, strict=True):
                    if not done.done():
                        done.set_result(answer)
            except Exception as error:  # noqa: BLE001 (raised in each waiting request)
                fault = error
            finally:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(fault)

    def _generate(self, requests: list[Request]) -> list[Answer]:
        from delib_fast.models.generate import Sampling, generate_ids

        params, tokenizer = requests[0].params, self._tokenizer  # the requests of an endpoint have equal parameters
        prompts = tokenizer.apply_chat_template(
            [list(request.messages) for request in requests], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        sampling = Sampling(
            max_new_tokens=params[self._limit_name],
            temperature=params["temperature"],
            top_p=params.get("top_p", 1.0),
            seed=int(requests[0].id[:12], 16),
            batch_size=len(requests),
        )
        stop_ids = self._stop_ids()
        replies = generate_ids(
            self._model, prompts, sampling, end_ids=sorted(stop_ids), pad_id=tokenizer.pad_token_id or 0
        )
        return [self._answer(ids, stop_ids, len(prompt)) for ids, prompt in zip(replies, prompts, strict=True)]

    def _stop_ids(self) -> set[int]:
        eos = self._model.generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    def _answer(self, ids: list[int], stop_ids: set[int], prompt_tokens: int) -> Answer:
        stopped = bool(ids) and ids[-1] in stop_ids
        # Special tokens are kept because <think> may be one; the token that ended the reply is not part of it.
        text = self._tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
        return Answer(
            text=text,
            finish="stop" if stopped else "length",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(ids),
            served_by="in process",
        )
