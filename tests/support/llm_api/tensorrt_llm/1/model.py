# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the LLM API's model of TensorRT-LLM: a causal language model on the CPU, with PEFT for its adapters.

Inputs, outputs and error texts are those of TensorRT-LLM's triton_backend/all_models/llmapi/tensorrt_llm/1/model.py and
helpers.py; adapters are kept and read again as its LoraManager does: by lora_id alone, max_cpu_loras of them, the least
recently used one leaving. A byte is a token, and sampling is greedy.
"""

from __future__ import annotations

import inspect
import json
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
import yaml

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
DEFAULT_MAX_TOKENS = 32
NOT_HERE = ("image_url", "sampling_param_temperature", "sampling_param_top_k", "sampling_param_top_p")


class TritonPythonModel:
    """One instance of the model."""

    @classmethod
    def auto_complete_config(cls, auto_complete_model_config: Any) -> Any:
        """Say what config.pbtxt leaves to model.yaml."""
        triton_config = read_yaml(Path(__file__).parent)["triton_config"]
        auto_complete_model_config.set_model_transaction_policy({"decoupled": bool(triton_config["decoupled"])})
        auto_complete_model_config.set_max_batch_size(int(triton_config["max_batch_size"]))
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load what model.yaml names."""
        torch.set_num_threads(1)
        settings = read_yaml(Path(args["model_repository"]) / args["model_version"])
        config = json.loads(args["model_config"])
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._llm = Llm(settings)
        self._pool = ThreadPoolExecutor(32)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Answer each request from a thread of its own."""
        for request in requests:
            self._pool.submit(self._answer, request)

    def finalize(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: pb_utils.InferenceRequest) -> None:
        sender = request.get_response_sender()
        try:
            streaming = bool(scalar(request, "streaming"))
            prompt = read_prompt(request)
            if streaming and not self._decoupled:
                raise pb_utils.TritonModelException("Streaming is only supported in decoupled mode.")
            for name in NOT_HERE:
                if pb_utils.get_input_tensor_by_name(request, name) is not None:
                    raise ValueError(f"{name} is not implemented in this stand-in")
            max_tokens = scalar(request, "sampling_param_max_tokens") or DEFAULT_MAX_TOKENS
            stop_words = strings(request, "sampling_param_stop") or []
            lora = read_lora(request)
            text, reason = "", "length"
            for token in self._llm.tokens(list(prompt.encode()), int(max_tokens), lora):
                text += chr(token)
                ends = [text.index(word) for word in stop_words if word in text]
                if ends:
                    text, reason = text[: min(ends)], "stop"
                    break
                if streaming:  # each answer has the whole text so far
                    sender.send(pb_utils.InferenceResponse([text_tensor("text_output", text)]))
            outputs = [text_tensor("text_output", text)]
            if scalar(request, "return_finish_reason"):
                outputs.append(text_tensor("finish_reason", reason))
            sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)
        except Exception as error:  # noqa: BLE001  as upstream does
            pb_utils.Logger.log_error(f"[trtllm] Error generating request: {error}")
            status = pb_utils.TritonError(f"Error generating request: {error}")
            sender.send(pb_utils.InferenceResponse([text_tensor("text_output", "N/A")], error=status), flags=FINAL)


class Llm:
    """The language model, and the adapters that it holds."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import transformers  # seconds, which the completion of the config need not take

        base: Any = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        self._base = base.eval()
        self._lora_config = settings.get("lora_config")
        self._lock = threading.Lock()
        self._model: Any = None  # PEFT's, from the first adapter on
        self._held: list[int] = []  # lora ids, the least recently used first

    def tokens(self, prompt: list[int], count: int, lora: tuple[int, str] | None) -> Iterator[int]:
        """The greedy answer. Requests take turns token by token."""
        unread, kv_cache = prompt, None
        takes = inspect.signature(self._base.forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        for _ in range(count):
            with self._lock, torch.inference_mode():
                self._use(lora)
                output = (self._model or self._base)(
                    input_ids=torch.tensor([unread]), use_cache=True, **{name: kv_cache}
                )
            kv_cache, unread = output[name], [int(output.logits[0, -1].argmax())]
            yield unread[0]

    def _use(self, lora: tuple[int, str] | None) -> None:
        if lora is None:
            if self._model is not None:
                self._model.base_model.disable_adapter_layers()
            return
        lora_id, path = lora
        if self._lora_config is None:
            raise ValueError("LoRA is not enabled: model.yaml has no lora_config")
        if lora_id in self._held:
            self._held.remove(lora_id)
        else:
            self._load(lora_id, path)
        self._held.append(lora_id)
        self._model.base_model.enable_adapter_layers()
        self._model.set_adapter(str(lora_id))
        while len(self._held) > self._lora_config["max_cpu_loras"]:
            self._model.delete_adapter(str(self._held.pop(0)))

    def _load(self, lora_id: int, path: str) -> None:
        import peft

        config = peft.PeftConfig.from_pretrained(path)
        most = self._lora_config["max_lora_rank"] if self._lora_config else 0
        if config.r > most:
            raise ValueError(f"Invalid low_rank ({config.r}). low_rank must be smaller than mMaxLowRank ({most})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if self._model is None:
                self._model = peft.PeftModel.from_pretrained(self._base, path, adapter_name=str(lora_id)).eval()
            else:
                self._model.load_adapter(path, adapter_name=str(lora_id))


def read_yaml(directory: Path) -> dict[str, Any]:
    """model.yaml of a version directory."""
    content: dict[str, Any] = yaml.safe_load((directory / "model.yaml").read_text())
    return content


def read_prompt(request: pb_utils.InferenceRequest) -> str:
    """text_input."""
    tensor = pb_utils.get_input_tensor_by_name(request, "text_input")
    if tensor is None:
        raise pb_utils.TritonModelException("text_input is missing from the request")
    if len(tensor.shape()) > 1:
        raise pb_utils.TritonModelException("The current implementation only supports text_input being a 1D tensor.")
    return str(tensor.as_numpy()[0].decode())


def read_lora(request: pb_utils.InferenceRequest) -> tuple[int, str] | None:
    """lora_id and lora_path; None for the base model."""
    lora_id, lora_name, lora_path = (scalar(request, name) for name in ("lora_id", "lora_name", "lora_path"))
    if lora_id is None and lora_name is None and lora_path is None:
        return None
    if lora_id is None or lora_name is None or lora_path is None:
        raise pb_utils.TritonModelException("lora_id, lora_name, and lora_path must all be provided together")
    source = scalar(request, "lora_ckpt_source") or b"hf"
    if source not in (b"hf", b"nemo"):
        raise pb_utils.TritonModelException(f"lora_ckpt_source must be one of ('hf', 'nemo'), got {source.decode()!r}")
    path = lora_path.decode()
    if not os.path.exists(path):  # noqa: PTH110  upstream's words and upstream's check
        raise pb_utils.TritonModelException(f"lora_path does not exist on the Triton server's filesystem: {path}")
    return int(lora_id), path


def scalar(request: pb_utils.InferenceRequest, name: str) -> Any:
    """The one element of an input, or None."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array = tensor.as_numpy()
    if array.size != 1:
        raise pb_utils.TritonModelException(f"Expected a scalar tensor for tensor {name}")
    return array.item()


def strings(request: pb_utils.InferenceRequest, name: str) -> list[str] | None:
    """The elements of a STRING input, or None."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else [value.decode() for value in tensor.as_numpy().reshape(-1)]


def text_tensor(name: str, text: str) -> pb_utils.Tensor:
    """A STRING output of one element."""
    return pb_utils.Tensor(name, np.array([text.encode()], np.object_))
