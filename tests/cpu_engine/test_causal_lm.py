# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine's answers with a real model against transformers' and PEFT's own `generate`, token for token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peft_oracle
from adapters import LLAMA_CONFIG, Saved, lora_weights, save_adapter, save_llama_adapter
from engine_client import Received, ask, config_directory, tensors_of
from peft_oracle import EOS, load_peft
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.tensors import lora_config
from tritonlora.cpu_engine.engine import CpuEngine, load_engine
from tritonlora.cpu_engine.request import GenerationRequest, Sampling
from tritonlora.cpu_engine.sampling import choose_token
from tritonlora.engine.profile import load_profile
from tritonlora.errors import EngineMismatch
from tritonlora.peft.adapter import load_adapter

PROMPTS = ([5, 17, 3, 42], [9, 9, 1], [60, 2, 33, 21, 8, 30])
LENGTH = 20


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def engines() -> Iterator[list[CpuEngine]]:
    """Engines that are closed at the end of the test."""
    opened: list[CpuEngine] = []
    yield opened
    for engine in opened:
        engine.close()


def engine_of(engines: list[CpuEngine], checkpoint: Path, **parameters: str) -> CpuEngine:
    parameters = {"gpt_model_path": str(checkpoint), "exclude_input_in_output": "true", **parameters}
    engines.append(load_engine(parameters, Path(), decoupled=True))
    return engines[-1]


def wire(saved: Saved) -> dict[str, torch.Tensor]:
    """The adapter's two tensors as they are sent, in the base model's dtype."""
    adapter, profile = load_adapter(saved.adapter), load_profile(saved.base)
    layout = plan_layout(adapter, dtype=profile.dtype, profile=profile, base=saved.base)
    return {
        "lora_weights": lora_weights(adapter, layout, base=saved.base)[None],
        "lora_config": lora_config(layout)[None],
    }


def oracle(saved: Saved) -> Any:
    return load_peft(saved.base, saved.adapter)


def generate(model: Any, prompt: Sequence[int], **options: Any) -> list[int]:
    return peft_oracle.generate(model, prompt, LENGTH, **options)


ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "rank 8 on q and v": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "ranks by pattern": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 4}},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_answers_are_pefts_own(
    tmp_path: Path, engines: list[CpuEngine], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The adapter's weights go over the wire once; its id then answers as PEFT does, and no id as the base model."""
    saved = save_llama_adapter(tmp_path, dtype=dtype, base_dtype=dtype, **options)
    engine = engine_of(engines, saved.base)
    loading = ask(engine, tensors_of(PROMPTS[0], LENGTH, end_id=EOS, lora_task_id=1, **wire(saved)))
    by_id = [ask(engine, tensors_of(prompt, LENGTH, end_id=EOS, lora_task_id=1)) for prompt in PROMPTS]
    base = [ask(engine, tensors_of(prompt, LENGTH, end_id=EOS)) for prompt in PROMPTS]

    model = oracle(saved)

    assert [generate(model, prompt) for prompt in PROMPTS] == [answer.tokens() for answer in by_id]
    assert loading.tokens() == by_id[0].tokens()
    with model.disable_adapter():
        assert [generate(model, prompt) for prompt in PROMPTS] == [answer.tokens() for answer in base]
    assert base[0].tokens() != by_id[0].tokens()


def test_dora_answers_are_pefts_own(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """The magnitudes that come after B are applied, with and without a bias in the layer."""
    saved = save_adapter(
        tmp_path,
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**LLAMA_CONFIG),
        dtype=torch.float32,
        use_dora=True,
    )
    engine = engine_of(engines, saved.base)
    answers = [ask(engine, tensors_of(p, LENGTH, end_id=EOS, lora_task_id=1, **wire(saved))) for p in PROMPTS]

    model = oracle(saved)

    assert [generate(model, prompt) for prompt in PROMPTS] == [answer.tokens() for answer in answers]


THREE: tuple[dict[str, Any], ...] = ({"r": 2}, {"r": 4}, {"target_modules": ["o_proj", "up_proj"]})


MODELS = {
    "in one pass": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA_CONFIG)),
    "each alone": (transformers.MistralForCausalLM, transformers.MistralConfig(**LLAMA_CONFIG, sliding_window=8)),
}


@pytest.mark.parametrize(("model_class", "config"), MODELS.values(), ids=MODELS.keys())
def test_adapters_of_requests_at_one_time_do_not_mix(
    tmp_path: Path, engines: list[CpuEngine], model_class: type, config: transformers.PretrainedConfig
) -> None:
    """Three adapters and the base model, each asked three questions at once, answer as each does alone."""
    adapters = [
        save_adapter(tmp_path / str(number), model_class, config, dtype=torch.float32, **options)
        for number, options in enumerate(THREE, start=1)
    ]
    engine = engine_of(engines, adapters[0].base)
    received: dict[tuple[int, int], Received] = {}
    for index, prompt in enumerate(PROMPTS):
        received[0, index] = ask(engine, tensors_of(prompt, LENGTH, end_id=EOS, streaming=True))
        for task, saved in enumerate(adapters, start=1):
            tensors = tensors_of(prompt, LENGTH, end_id=EOS, lora_task_id=task, streaming=True, **wire(saved))
            received[task, index] = ask(engine, tensors)
    models = [oracle(saved) for saved in adapters]
    expected = {
        (task, index): generate(model, prompt)
        for task, model in enumerate(models, start=1)
        for index, prompt in enumerate(PROMPTS)
    }
    with models[0].disable_adapter():
        expected |= {(0, index): generate(models[0], prompt) for index, prompt in enumerate(PROMPTS)}

    assert expected == {key: answer.tokens() for key, answer in received.items()}


def test_other_weights_under_a_cached_id_change_nothing(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """As in the engine: the first adapter keeps answering."""
    first, second = (save_llama_adapter(tmp_path / str(r), dtype=torch.float32, r=r) for r in (2, 4))
    engine = engine_of(engines, first.base)
    before, after = (
        ask(engine, tensors_of(PROMPTS[0], LENGTH, end_id=EOS, lora_task_id=1, **wire(saved))).tokens()
        for saved in (first, second)
    )

    assert before == after
    assert generate(oracle(second), PROMPTS[0]) != after


def test_a_row_for_another_module_changes_the_answer(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """A wrong module id with the same dims (gate and up swapped) is visible in the tokens."""
    saved = save_llama_adapter(tmp_path, dtype=torch.float32, target_modules=["gate_proj", "up_proj"])
    engine = engine_of(engines, saved.base)
    swapped = wire(saved)
    ids = swapped["lora_config"][..., 0]
    ids.copy_(torch.where(ids == 5, 7, 5))

    assert (
        generate(oracle(saved), PROMPTS[0])
        != ask(engine, tensors_of(PROMPTS[0], LENGTH, end_id=EOS, lora_task_id=1, **swapped)).tokens()
    )


def test_penalties_are_transformers_own(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """repetition_penalty, end_id held back by min_length, and bad words, against `generate`."""
    saved = save_llama_adapter(tmp_path, dtype=torch.float32)
    engine = engine_of(engines, saved.base)
    prompt = PROMPTS[0]
    model = oracle(saved)
    with model.disable_adapter():
        plain, penalized = generate(model, prompt), generate(model, prompt, repetition_penalty=1.7)
        without = generate(model, prompt, bad_words_ids=[[plain[0]], plain[1:3]])
    words = torch.tensor([[[plain[0], *plain[1:3]], [1, 3, -1]]], dtype=torch.int32).numpy()

    assert penalized == ask(engine, tensors_of(prompt, LENGTH, end_id=EOS, repetition_penalty=1.7)).tokens()
    assert without == ask(engine, tensors_of(prompt, LENGTH, end_id=EOS, bad_words_list=words)).tokens()
    assert [] == ask(engine, tensors_of(prompt, LENGTH, end_id=plain[0])).tokens()
    assert 5 <= len(ask(engine, tensors_of(prompt, LENGTH, end_id=plain[0], min_length=5)).tokens())


def test_sampling_is_repeatable_by_its_seed(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """The same seed gives the same answer, another seed another one, and top_k 1 the greedy one."""
    saved = save_llama_adapter(tmp_path, dtype=torch.float32)
    engine = engine_of(engines, saved.base)

    def sampled(**inputs: Any) -> list[int]:
        return ask(engine, tensors_of(PROMPTS[0], LENGTH, **inputs)).tokens()

    assert sampled(runtime_top_k=20, random_seed=1) == sampled(runtime_top_k=20, random_seed=1)
    assert sampled(runtime_top_k=20, random_seed=1) != sampled(runtime_top_k=20, random_seed=2)
    assert sampled() == sampled(runtime_top_k=1, random_seed=2, temperature=3.0)


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_p=0.6), {0, 1}),
        (Sampling(top_p=0.4), {0}),
        (Sampling(top_k=3, top_p=0.9), {0, 1, 2}),
        (Sampling(top_k=4, temperature=0.01), {0}),
        (Sampling(top_p=1.0), {0, 1, 2, 3}),
    ],
)
def test_sampling_takes_only_the_likeliest_tokens(sampling: Sampling, tokens: set[int]) -> None:
    """Probabilities 0.5, 0.25, 0.15, 0.1: what 400 draws give."""
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    request = GenerationRequest((0,), 1, sampling=sampling)

    assert tokens == {choose_token(logits, request, [], generator) for _ in range(400)}


def test_presence_and_frequency_are_subtracted_from_tokens_of_the_answer() -> None:
    """Token 0 leads by 1.0; presence 0.6 and twice frequency 0.3 bring it down to 1.2 less."""
    request = GenerationRequest((0,), 1, sampling=Sampling(presence_penalty=0.6, frequency_penalty=0.3))
    generator = torch.Generator()

    assert [0, 0, 1] == [
        choose_token(torch.tensor([1.0, 0.0]), request, answer, generator) for answer in ([], [0], [0, 0])
    ]


def test_a_prompt_beyond_the_models_length_is_refused(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """And an answer ends where the model's positions do."""
    config = transformers.LlamaConfig(**LLAMA_CONFIG, max_position_embeddings=8)
    saved = save_adapter(tmp_path, transformers.LlamaForCausalLM, config)
    engine = engine_of(engines, saved.base)

    assert 2 == len(ask(engine, tensors_of(PROMPTS[2], LENGTH)).tokens())
    assert "Prompt length (8) exceeds maximum input length (7)." in str(ask(engine, tensors_of([1] * 8, 1)).failure())


def test_one_bad_request_does_not_end_the_others(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """A token id beyond the vocabulary fails its own request only."""
    saved = save_llama_adapter(tmp_path, dtype=torch.float32)
    engine = engine_of(engines, saved.base)
    good, bad = ask(engine, tensors_of(PROMPTS[0], LENGTH)), ask(engine, tensors_of([1000], LENGTH))

    assert "token 1000 is not one of the model's 64 tokens" in str(bad.failure())
    assert LENGTH == len(good.tokens())


def test_fused_layers_are_refused_when_the_model_loads(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """They would be taken for layers without LoRA."""
    config = transformers.Phi3Config(**LLAMA_CONFIG, pad_token_id=0)
    saved = save_adapter(tmp_path, transformers.Phi3ForCausalLM, config, target_modules=["qkv_proj"])

    with pytest.raises(EngineMismatch, match="attn_qkv is one fused layer"):
        engine_of(engines, saved.base)


def test_a_checkpoint_without_weights_is_refused_by_its_path(tmp_path: Path, engines: list[CpuEngine]) -> None:
    """A config.json alone is enough for the synthetic model only."""
    directory = config_directory(tmp_path / "empty")

    with pytest.raises(EngineMismatch, match="gpt_model_path: .*empty' is not a checkpoint that transformers can load"):
        engine_of(engines, directory)
