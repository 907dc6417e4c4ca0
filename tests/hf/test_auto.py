"""Folders: the Auto classes, with and without `import rwkvx`, and `rwkvx.load` on the same ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import CONFIG, adapter, prompts
from small import random_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rwkvx
from rwkvx import InputError, ModelConfig
from rwkvx.checkpoint.folder import save_folder
from rwkvx.hf import RwkvxConfig, RwkvxForCausalLM
from rwkvx.tokenizers import ByteTokenizer, WorldTokenizer

IDS = prompts(lengths=[60])[0]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """One model as `rwkvx convert` writes it, and as Hugging Face does, whole and in shards."""
    hf = adapter(torch.float32)
    save_folder(hf.model, tmp_path / "own")
    hf.save_pretrained(tmp_path / "hf")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return [tmp_path / name for name in ("own", "hf", "shards")]


@torch.no_grad()
def test_both_loaders_read_every_folder(folders: list[Path]) -> None:
    expected = adapter(torch.float32)(IDS).logits
    assert len(list(folders[2].glob("model-*.safetensors"))) > 2
    for folder in folders:
        model = rwkvx.load(folder, verify=True)
        assert model.config == CONFIG
        assert torch.equal(model(IDS)[0], expected)
        hf, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert isinstance(hf, RwkvxForCausalLM)
        assert not any(info.values()), info
        assert not hf.training
        assert hf.dtype == torch.float32
        assert torch.equal(hf(IDS).logits, expected)
        assert type(AutoTokenizer.from_pretrained(folder)) is ByteTokenizer
        config = AutoConfig.from_pretrained(folder)
        assert isinstance(config, RwkvxConfig)
        assert config.model_config() == CONFIG
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
            32,
            4,
            4,
        )


@torch.no_grad()
def test_there_and_back(folders: list[Path], tmp_path: Path) -> None:
    """Hugging Face's folder of rwkvx's folder of Hugging Face's: the same bytes of weights."""
    first = (folders[0] / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(folders[0]).save_pretrained(tmp_path / "a")
    save_folder(rwkvx.load(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "b" / "config.json").read_bytes() == (
        folders[0] / "config.json"
    ).read_bytes()


def test_trust_remote_code_needs_no_import(folders: list[Path], tmp_path: Path) -> None:
    """In a fresh process; what the classes save there is again a folder for everybody."""
    code = (
        "import sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "source, target = sys.argv[1:]\n"
        "assert 'rwkvx' not in sys.modules\n"
        "trust = {'trust_remote_code': True}\n"
        "assert AutoConfig.from_pretrained(source, **trust).topk == 3\n"
        "tokenizer = AutoTokenizer.from_pretrained(source, **trust)\n"
        "model = AutoModelForCausalLM.from_pretrained(source, **trust)\n"
        "assert type(model).__module__ == 'rwkvx.hf', type(model)\n"
        "ids = tokenizer(['a longer text', 'short'], return_tensors='pt', padding=True)\n"
        "model.generate(**ids, max_new_tokens=3)\n"
        "model.save_pretrained(target); tokenizer.save_pretrained(target)\n"
    )
    for folder in folders[:1]:
        out = tmp_path / f"{folder.name}-again"
        subprocess.run([sys.executable, "-c", code, str(folder), str(out)], check=True)
        assert rwkvx.load(out, verify=True).fingerprint() == rwkvx.load(folder).fingerprint()
        assert sorted(p.name for p in out.glob("*.py")) == ["modeling_rwkvx.py"]
        assert len((out / "modeling_rwkvx.py").read_text().splitlines()) == 2
        loaded = json.loads((out / "tokenizer_config.json").read_text())
        assert loaded["auto_map"] == {"AutoTokenizer": ["modeling_rwkvx.ByteTokenizer", None]}
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


@pytest.mark.parametrize(
    "first",
    [
        "import rwkvx; from transformers import pipeline",  # its modules import one another
        "from transformers import AutoConfig; import rwkvx",
    ],
)
def test_registered_in_any_order_of_imports(first: str) -> None:
    code = (
        f"{first}\n"
        "from transformers import AutoTokenizer, AutoModelForCausalLM, AutoConfig\n"
        "config = AutoConfig.for_model('rwkvx', width=64, pattern=['rwkv7'])\n"
        "assert type(AutoModelForCausalLM.from_config(config)).__name__ == 'RwkvxForCausalLM'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_costs_nothing_until_the_auto_classes_are_used() -> None:
    code = (
        "import sys, rwkvx\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "import transformers\n"
        "assert 'rwkvx.hf' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.for_model('rwkvx').width == 768\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tokenizer_is_the_models(tmp_path: Path) -> None:
    """Also without tokenizer_config.json; a tokenizer that is there is left alone."""
    for tokenizer, kind in (("world", WorldTokenizer), ("bytes", ByteTokenizer)):
        folder = tmp_path / tokenizer
        config = ModelConfig.from_dict({**CONFIG.to_dict(), "tokenizer": tokenizer})
        save_folder(random_model(config), folder)
        assert type(AutoTokenizer.from_pretrained(folder)) is kind
        (folder / "tokenizer_config.json").unlink()
        assert type(AutoTokenizer.from_pretrained(folder)) is kind
    ByteTokenizer(pad_token="x", model_max_length=99).save_pretrained(folder)
    save_folder(random_model(CONFIG), folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("x", 99)
    rwkvx.load(folder, verify=True)


def test_config() -> None:
    config = RwkvxConfig(**CONFIG.to_dict(), topk_was=1)
    again = RwkvxConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.topk_was == 1
    assert RwkvxConfig().model_config().width == 768
    assert config.max_position_embeddings == 8192  # lm-eval takes 2048 where there is none
    for bad, message in (
        ({"width": 33}, "no multiple of head_size"),
        ({"pattern": ["rwkv7", "dense"]}, "pattern must be a list"),
    ):
        with pytest.raises(InputError, match=message):
            RwkvxConfig(**{**CONFIG.to_dict(), **bad})


def test_overrides_and_dtype(folders: list[Path]) -> None:
    hf = AutoModelForCausalLM.from_pretrained(folders[1], topk=2, dtype=torch.bfloat16)
    assert hf.model.config.topk == 2
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    own = rwkvx.load(folders[0], topk=2, dtype="bfloat16")
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, own(IDS)[0])
    hf.save_pretrained(folders[1])
    assert AutoModelForCausalLM.from_pretrained(folders[1]).dtype == torch.bfloat16
    assert rwkvx.load(folders[1]).config.topk == 2


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@torch.no_grad()
def test_device_map(folders: list[Path], device_map: str | dict[str, str]) -> None:
    pytest.importorskip("accelerate")
    hf = AutoModelForCausalLM.from_pretrained(folders[2], device_map=device_map)
    assert torch.equal(hf(IDS).logits, adapter(torch.float32)(IDS).logits)


def test_generation_config(folders: list[Path]) -> None:
    for folder in folders:
        config = AutoModelForCausalLM.from_pretrained(folder).generation_config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    assert GenerationConfig.from_pretrained(folders[1]).eos_token_id == 0


def test_missing_and_wrong_tensors_are_named(folders: list[Path]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders[0] / "model.safetensors")
    value = tensors.pop("blocks.1.ffn.value.weight")
    tensors["blocks.9.extra"] = torch.zeros(2)
    save_file(tensors, folders[0] / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)
    hf, info = AutoModelForCausalLM.from_pretrained(folders[0], output_loading_info=True)
    assert set(info["missing_keys"]) == {"blocks.1.ffn.value.weight"}
    assert set(info["unexpected_keys"]) == {"blocks.9.extra"}
    assert not hf.model.blocks[1].ffn.value.weight.any()  # the initial value of this one
    assert torch.equal(hf.model.head.weight, tensors["head.weight"])
    tensors["blocks.1.ffn.value.weight"] = value[:, :3].clone()
    save_file(tensors, folders[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folders[0])
    hf = AutoModelForCausalLM.from_pretrained(folders[0], ignore_mismatched_sizes=True)
    assert not hf.model.blocks[1].ffn.value.weight.any()


def test_the_code_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [x for x in text.split("```python\n")[1:] if "AutoTokenizer" in x]
    save_folder(rwkvx.load("passkey-tiny"), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block.partition("```")[0], names)
    assert rwkvx.load("my-copy").fingerprint() == rwkvx.load("passkey-tiny").fingerprint()
    assert "Here we go. There and back" in names["tokenizer"].decode(names["out"][1])
