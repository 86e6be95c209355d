"""The model: the same on every rank, its losses exact sums, and a folder that transformers opens."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commlab.errors import UsageError
from commlab.trainer.config import Config
from commlab.trainer.data import batches
from commlab.trainer.model import (
    IGNORED,
    PRESETS,
    bits_per_byte,
    build_model,
    describe_model,
    evaluate,
    loss_sum,
    save_model,
)

EPSILON = torch.finfo(torch.float32).eps


def tiny(**changes: object) -> torch.nn.Module:
    return build_model(**{"name": "gpt2-tiny", "seq_len": 128, "vocab_size": 256, "separator": 0, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny(seed=5)


def some_batch(rows: int, seq_len: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 256, (rows, seq_len + 1), generator=torch.Generator().manual_seed(rows))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize(("name", "numel"), [("gpt2-tiny", 842_496), ("gpt2-100m", 106_331_904), ("gpt2", 124_439_808)])
def test_size_is_what_the_name_says(name: str, numel: int) -> None:
    with torch.device("meta"):
        built = build_model(name, seq_len=8, vocab_size=256)
    vocab_size = PRESETS[name].vocab_size or 256
    width, layers, positions = (PRESETS[name].config[key] for key in ("n_embd", "n_layer", "n_positions"))
    assert sum(p.numel() for p in built.parameters()) == numel
    assert numel == (vocab_size + positions) * width + layers * (12 * width**2 + 13 * width) + 2 * width


def test_seed_decides_the_weights_and_touches_nothing_else(model: torch.nn.Module) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, other = tiny(seed=5), tiny(seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(again.transformer.wte.weight, other.transformer.wte.weight)
    assert again.training
    assert all(p.dtype == torch.float32 for p in again.parameters())


def test_loss_is_the_sum_over_tokens(model: torch.nn.Module) -> None:
    input_ids, labels = some_batch(3)
    labels[1, 5:] = IGNORED
    loss, tokens = loss_sum(model, input_ids, labels)
    assert (loss.dtype, loss.shape, tokens) == (torch.float32, (), 2 * 24 + 5)
    with torch.no_grad():
        log_p = model(input_ids=input_ids).logits.double().log_softmax(-1)
    exact = -sum(log_p[i, j, labels[i, j]].item() for i in range(3) for j in range(24) if labels[i, j] != IGNORED)
    # Each fp32 log-softmax is off by a few roundings of a number around log(256), and so is a sum of 53 of them.
    assert loss.item() == pytest.approx(exact, rel=16 * EPSILON)


def test_loss_is_the_one_of_transformers(model: torch.nn.Module) -> None:
    input_ids, labels = some_batch(4)
    loss, tokens = loss_sum(model, input_ids, labels)
    whole = torch.cat([input_ids, labels[:, -1:]], 1)
    with torch.no_grad():
        theirs = model(input_ids=whole, labels=whole).loss.item()  # shifts by itself; a mean
    assert loss.item() / tokens == pytest.approx(theirs, rel=16 * EPSILON)


def test_padding_changes_nothing(model: torch.nn.Module) -> None:
    input_ids, labels = some_batch(1, 10)
    padded_ids, padded_labels = torch.zeros(1, 24, dtype=torch.int64), torch.full((1, 24), IGNORED)
    padded_ids[:, :10], padded_labels[:, :10] = input_ids, labels
    short, padded = loss_sum(model, input_ids, labels), loss_sum(model, padded_ids, padded_labels)
    assert short[1] == padded[1] == 10
    assert short[0].item() == pytest.approx(padded[0].item(), rel=64 * EPSILON)


def test_parts_add_up_to_the_whole(model: torch.nn.Module) -> None:
    input_ids, labels = some_batch(5)

    def gradients(parts: list[slice]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss, _ = loss_sum(model, input_ids[part], labels[part])
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in model.parameters()]

    whole, whole_grads = gradients([slice(0, 5)])
    parts, part_grads = gradients([slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 5)])
    assert parts == pytest.approx(whole, rel=16 * EPSILON)
    biases = {name for name, _ in model.named_parameters() if name.endswith("c_attn.bias")}  # key part: pure rounding
    for (name, _), a, b in zip(model.named_parameters(), whole_grads, part_grads, strict=True):
        if name not in biases:
            assert (a - b).norm() <= 1e-5 * a.norm(), name


def test_no_samples_give_zero_to_every_parameter(model: torch.nn.Module) -> None:
    model.zero_grad()
    input_ids, labels = some_batch(2)
    loss, tokens = loss_sum(model, input_ids[:0], labels[:0])
    loss.backward()
    assert (loss.item(), tokens) == (0.0, 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_loss_keeps_32_bits_under_autocast(model: torch.nn.Module) -> None:
    input_ids, labels = some_batch(2, 8)
    exact, _ = loss_sum(model, input_ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_sum(model, input_ids, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2**-7)


def test_a_model_that_knows_nothing_needs_8_bits_per_byte() -> None:
    blank = tiny()
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    input_ids, labels = some_batch(3)
    total, tokens, byte_count = evaluate(blank, [(input_ids, labels, 72), (input_ids[:1], labels[:1], 24)])
    assert (tokens, byte_count) == (96, 96)
    assert total == pytest.approx(96 * math.log(256), rel=16 * EPSILON)
    assert bits_per_byte(total, byte_count) == pytest.approx(8, rel=16 * EPSILON)


def test_evaluation_drops_nothing_and_restores_the_mode() -> None:
    dropping = tiny(dropout=0.5)
    input_ids, labels = some_batch(2)
    assert loss_sum(dropping, input_ids, labels)[0] != loss_sum(dropping, input_ids, labels)[0]
    first, second = (evaluate(dropping, [(input_ids, labels, 48)]) for _ in range(2))
    assert first == second
    assert dropping.training
    assert evaluate(dropping.eval(), [(input_ids, labels, 48)]) == first
    assert not dropping.training
    assert evaluate(dropping, []) == (0.0, 0, 0)


def test_saved_folder_opens_in_transformers(
    model: torch.nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2LMHeadModel

    save_model(model, str(tmp_path / "new" / "folder"))
    assert capfd.readouterr() == ("", "")
    opened = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder")
    assert (opened.config.vocab_size, opened.config.bos_token_id, opened.config.eos_token_id) == (256, 0, 0)
    input_ids, _ = some_batch(2)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=input_ids).logits, model.eval()(input_ids=input_ids).logits)
    model.train()


def config_file(folder: Path, content: object) -> str:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_config_file(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "n_ctx": 32, "vocab_size": 300}
    name = config_file(tmp_path, {**sizes, "attn_pdrop": 0.25, "model_type": "gpt2"})
    shape = describe_model(name)
    assert (shape.seq_len, shape.positions, shape.vocab_size) == (32, 64, 300)
    built = build_model(name, seq_len=64, vocab_size=256, separator=0)
    assert built.config.vocab_size == 300, "a config keeps its own vocabulary"
    assert (built.config.attn_pdrop, built.config.eos_token_id) == (0.25, 0)
    assert build_model(name, seq_len=64, vocab_size=256, dropout=0.0).config.attn_pdrop == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["cannot be read"]),
        ([], ["describes 'list'", "GPT-2"]),
        ({"model_type": "bert"}, ["'bert'", "GPT-2"]),
        ({}, ["no model_type", "GPT-2"]),
        ("[" * 100_000, ["nested too deeply"]),
        ("{}" + " " * (1 << 20), ["larger than 1 MiB"]),
        ({"n_positions": 0}, ["n_positions", "got 0"]),
        ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
        ({"n_embd": 10, "n_head": 3, "n_layer": 1}, ["n_embd 10 can't be cut into n_head 3"]),
        *(({"n_ctx": value}, ["n_ctx", f"got {value!r}"]) for value in (None, "many", 0, True, 1.5)),
        *(({key: 0}, [key, "got 0"]) for key in ("n_embd", "n_layer", "n_head", "vocab_size", "n_inner")),
        ({"n_layer": -1}, ["n_layer", "got -1"]),
        ({"num_hidden_layers": -1}, ["n_layer", "got -1"]),
        ({"n_layer": 3, "num_hidden_layers": 2}, ["num_hidden_layers 2 and n_layer 3"]),
        ({"n_layers": 3}, ["unknown key 'n_layers'", "did you mean 'n_layer'"]),
        *(({"initializer_range": value}, ["initializer_range", "above 0"]) for value in (-1, 0, "0.02", None)),
        *(({"resid_pdrop": value}, ["resid_pdrop", f"got {value!r}"]) for value in ("0.1", 1, -0.1, None, True)),
        ('{"model_type": "gpt2", "attn_pdrop": NaN}', ["attn_pdrop", "got nan"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": "end"}, ["eos_token_id", "'end'"]),
        ({"activation_function": 3}, ["activation_function", "got 3"]),
        (
            {"activation_function": "gelux", "n_layer": 1, "n_embd": 2, "n_head": 1},
            ["transformers cannot build", "gelux"],
        ),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
        ({"n_layer": 10**6, "n_embd": 10**4, "n_head": 1}, ["takes 4,80", "GB", "of memory are left"]),
    ],
)
def test_config_files_that_cannot_be_used(tmp_path: Path, content: object, words: list[str]) -> None:
    """Config of a model: one sentence for each wrong value, and not another library's error."""
    if isinstance(content, dict) and content and "model_type" not in content:
        content["model_type"] = "gpt2"
    name = config_file(tmp_path, content)
    with pytest.raises(UsageError) as caught:
        build_model(name, seq_len=8, vocab_size=1)
    assert all(word in str(caught.value) for word in [name, *words]), str(caught.value)


def test_a_model_folder_gives_its_weights(tmp_path: Path) -> None:
    """A folder of transformers: also one in 16 bits, and one that was saved without the head."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 300, "model_type": "gpt2"}
    built = build_model(config_file(tmp_path, sizes), seq_len=64, vocab_size=256, seed=3)
    values = [value.half().float() for value in built.parameters()]
    for number, saved in enumerate((built.half(), built.transformer)):
        folder = str(tmp_path / str(number))
        saved.save_pretrained(folder)
        shape = describe_model(folder)
        assert (shape.weights, shape.tokenizer, shape.positions, shape.vocab_size) == (folder, None, 64, 300)
        again = build_model(folder, seq_len=64, vocab_size=256)
        assert again.training
        for value, other in zip(values, again.parameters(), strict=True):
            assert other.dtype == torch.float32
            assert torch.equal(value, other)
    Path(folder, "tokenizer.json").touch()
    assert Config(model=folder).tokenizer == folder
    assert Config(model=folder, tokenizer="bytes").tokenizer == "bytes"
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(UsageError, match=r"the weights of .*lack 'h.1.*|the weights of .* lack 'transformer.h.1"):
        build_model(folder, seq_len=64, vocab_size=256)
    Path(folder, "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="transformers cannot load model"):
        build_model(folder, seq_len=64, vocab_size=256)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config.json \(it is empty\)"):
        describe_model(str(tmp_path))
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(UsageError, match=r"has no config.json \(it has tf_model.h5\)"):
        describe_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match=r"has weights in tf_model.h5 alone"):
        describe_model(str(tmp_path))
    (tmp_path / "tf_model.h5").unlink()
    assert describe_model(str(tmp_path)).weights is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "gpt2-tyni"}, ["unknown model 'gpt2-tyni'", *PRESETS, "did you mean 'gpt2-tiny'"]),
        ({"seq_len": 129}, ["129", "128 positions"]),
        ({"name": "gpt2-100m", "vocab_size": 30_000}, ["30000 ids", "26679"]),
    ],
)
def test_what_does_not_fit(changes: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tiny(**changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_labels_and_losses_agree_on_what_is_ignored() -> None:
    assert batches.IGNORED == IGNORED


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = ("torch", "transformers", "numpy")
    modules = "commlab.trainer.config, commlab.trainer.model, commlab.strategies.options"
    program = f"import sys, {modules}; sys.exit([name for name in {heavy} if name in sys.modules] or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
