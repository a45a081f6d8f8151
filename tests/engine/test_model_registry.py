"""What a `--model` value means."""

import os
import tomllib
from pathlib import Path

import pytest

from sparsecache.engine import model_registry
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.model_registry import checkpoint_folder, find_model, model_names
from sparsecache.errors import UsageError


@pytest.fixture
def tables(monkeypatch) -> dict[str, dict[str, object]]:
    """models.toml for one test."""
    found = {
        "default": {"chat_template_args": {"enable_thinking": False, "date_string": "1 May 2024"}},
        "tiny": {
            "path": "some/where",
            "model_type": "llama",
            "window": 64,
            "max_length": 50,
            "chat": "[{prompt}]",
            "data": "sample",
            "note": "Tiny.",
        },
        "big": {
            "hub": "owner/Big-Model",
            "revision": "abc",
            "model_type": "qwen3",
            "dtype": "float16",
            "chat_template_args": {"date_string": "2 May 2024"},
        },
    }
    monkeypatch.setattr(model_registry, "read_tables", lambda name: found)
    return found


def test_a_tables_name_brings_its_settings(tables, monkeypatch) -> None:
    monkeypatch.setattr(model_registry, "project_dir", lambda: Path("base"))
    assert model_names() == ["tiny", "big"]
    model = find_model("tiny")
    assert (model.name, model.table, model.path, model.hub) == ("tiny", "tiny", Path("base/some/where"), None)
    assert (model.model_type, model.max_length, model.chat, model.note) == ("llama", 50, "[{prompt}]", "Tiny.")
    assert (model.window, find_model("big").window) == (64, None)
    assert (model.data, find_model("big").data) == ("sample", None)
    assert model.chat_template_args == {"enable_thinking": False, "date_string": "1 May 2024"}


def test_a_hub_table_and_the_hub_id_itself_mean_the_same_settings(tables) -> None:
    by_name, by_id = find_model("big"), find_model("owner/Big-Model")
    assert (by_name.name, by_name.hub, by_name.path) == ("big", "owner/Big-Model", None)
    assert (by_id.name, by_id.hub, by_id.path) == ("Big-Model", "owner/Big-Model", None)
    for model in (by_name, by_id):
        assert (model.table, model.revision, model.dtype, model.model_type) == ("big", "abc", "float16", "qwen3")
        assert model.chat_template_args == {"enable_thinking": False, "date_string": "2 May 2024"}


def test_any_other_hub_id_gets_the_defaults_only(tables) -> None:
    model = find_model("someone/else-1b")
    assert (model.name, model.hub, model.table, model.max_length) == ("else-1b", "someone/else-1b", None, None)
    assert model.chat_template_args == {"enable_thinking": False, "date_string": "1 May 2024"}


@pytest.mark.parametrize(("name", "table"), [("mine", None), ("big", "big"), ("Big-Model", "big")])
def test_a_folder_is_named_by_its_last_part_and_takes_the_table_of_that_name(name, table, tables, tmp_path) -> None:
    (tmp_path / name).mkdir()
    for text in (str(tmp_path / name), f"{tmp_path / name}/", f"{tmp_path}/{name}/../{name}"):
        model = find_model(text)
        assert (model.name, model.table, model.hub) == (name, table, None)
        assert os.path.samefile(model.path, tmp_path / name)


def test_the_table_of_a_folder_describes_that_folder_only(tables, tmp_path) -> None:
    (tmp_path / "tiny").mkdir()
    assert find_model(str(tmp_path / "tiny")).table is None
    assert find_model("someone/tiny").note is None


def test_another_repository_of_the_same_name_has_other_revisions(tables) -> None:
    assert (find_model("fork/Big-Model").table, find_model("fork/Big-Model").revision) == ("big", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_length", value) for value in (0, 1, -5, True, "3500", 3500.0, 10**12, [3500])],
        *[("window", value) for value in (0, -1, "4096", 1e9, None)],
        *[("chat", value) for value in (0, "", "no place for it", ["template"], "a\0{prompt}")],
        *[("chat_template_args", value) for value in ("x", [], 3)],
        *[("dtype", value) for value in ("bf16", ["float16"], 16)],
        *[("hub", value) for value in ("no-slash", 3, "a/b/c", "/x")],
        *[(name, value) for name in ("revision", "model_type", "data", "note") for value in (3, "", [], {})],
    ],
    ids=repr,
)
def test_a_wrong_value_is_refused_with_table_and_field(field, value, tables) -> None:
    tables["big"][field] = value
    with pytest.raises(UsageError, match=rf"\[big\].*{field}"):
        find_model("tiny")


def test_tables_that_are_none_or_have_no_address_are_refused(tables) -> None:
    tables["loose"] = 3
    with pytest.raises(UsageError, match="'loose' outside a table"):
        find_model("tiny")
    tables["loose"] = {"model_type": "llama"}
    with pytest.raises(UsageError, match=r"\[loose\].*either path or hub"):
        find_model("tiny")


def test_a_broken_file_is_refused_in_one_sentence(monkeypatch) -> None:
    def broken(name: str) -> None:
        tomllib.loads("[big\nhub = 3")

    monkeypatch.setattr(model_registry, "read_tables", broken)
    with pytest.raises(UsageError, match=r"configs/models\.toml cannot be read"):
        model_names()


def test_unknown_fields_and_dtypes_of_a_table_are_refused(tables) -> None:
    tables["big"]["max_lenght"] = 300
    with pytest.raises(UsageError, match=r"Table \[big\] .* unknown fields: max_lenght\. Fields: .*max_length"):
        find_model("big")
    del tables["big"]["max_lenght"]
    tables["big"]["dtype"] = "bf16"
    with pytest.raises(UsageError, match="'bf16' must be one of bfloat16, float16, float32"):
        find_model("big")


@pytest.mark.parametrize("file", ["config.json", "model.gguf"])
def test_a_checkpoint_folder_hides_a_hub_table_of_its_name_and_no_other_folder_does(
    file, tables, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    assert find_model("big").hub == "owner/Big-Model"
    (tmp_path / "big" / file).write_text("{}")
    assert find_model("big").path is not None and find_model("big").path.parts[0] == "big"


def test_no_folder_hides_a_bundled_checkpoint(tables, tmp_path, monkeypatch) -> None:
    """A folder called demo is what a clone of many projects holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert find_model("tiny").table == "tiny"
    assert find_model("./tiny").path == Path("tiny") and find_model("./tiny").table is None


def test_a_link_is_named_as_typed(tables, tmp_path, monkeypatch) -> None:
    """A hub snapshot is a folder named by a hash; people link to it."""
    (tmp_path / "0123abcd").mkdir()
    (tmp_path / "llama-link").symlink_to(tmp_path / "0123abcd")
    assert find_model(str(tmp_path / "llama-link")).name == "llama-link"
    monkeypatch.chdir(tmp_path / "0123abcd")
    assert find_model(".").name == "0123abcd"
    assert find_model("..").name == tmp_path.name


@pytest.mark.parametrize("text", ["tinny", "default", "", "a/b/c", "./x/y", "/no/where", "../up", "~/x", "owner/"])
def test_anything_else_is_refused_with_the_names(text, tables) -> None:
    with pytest.raises(UsageError) as refused:
        find_model(text)
    assert repr(text) in str(refused.value)
    assert "(tiny, big)" in str(refused.value) and "owner/name" in str(refused.value)


def test_every_real_table_is_well_formed() -> None:
    for name in model_names():
        model = find_model(name)
        assert (model.path is None) != (model.hub is None), name
        assert model.model_type in ("llama", "mistral", "qwen2", "qwen3"), name
        assert model.chat in (None, "template", "none") or model.chat.count("{prompt}") == 1, name


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("vicuna-v1.5-7b-16k", 16384),
        ("lmsys/vicuna-7b-v1.5-16k", 16384),
        ("longchat-v1.5-7b-32k", 32768),
        ("lmsys/longchat-7b-v1.5-32k", 32768),
    ],
)
def test_scaled_checkpoints_have_the_window_that_they_were_tuned_for(text, window) -> None:
    """Their config.json states the 4096 tokens of before."""
    model = find_model(text)
    assert model.window == window and model.max_length < window


def test_a_folder_without_config_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        Checkpoint(checkpoint_folder(find_model(str(tmp_path)), offline=True, allow_pickle=False))


def _fill_cache(cache: Path, files: tuple[str, ...]) -> Path:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--owner--cached"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def test_offline_a_hub_id_comes_from_the_cache_or_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = _fill_cache(tmp_path, ("config.json",))
    assert checkpoint_folder(find_model("owner/cached"), offline=True, allow_pickle=False) == snapshot
    with pytest.raises(
        UsageError, match=r"Could not download the checkpoint owner/absent \(.*Run once without --offline"
    ):
        checkpoint_folder(find_model("owner/absent"), offline=True, allow_pickle=False)


@pytest.mark.parametrize(("weights", "allow_pickle"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_download_takes_one_format_of_the_weights_and_only_when_asked(weights, allow_pickle, monkeypatch) -> None:
    asked = {}

    def download(hub, **options):
        asked.update(options, hub=hub)
        raise OSError  # without a message

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UsageError, match=r"Could not download the checkpoint owner/any \(OSError\)\. Check the name"):
        checkpoint_folder(find_model("owner/any"), offline=False, weights=weights, allow_pickle=allow_pickle)
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model", "merges.txt", "chat_template.jinja", "pytorch_model.bin", "consolidated.safetensors",
        "original/params.json", "original/consolidated.00.pth", "onnx/config.json", "modeling_x.py",
        "flax_model.msgpack",
    ]  # fmt: skip
    taken = set(
        filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    )
    shards = [files[1], *(["pytorch_model.bin"] if allow_pickle else [])] if weights else []
    assert taken == {files[0], *files[2:7], *shards}
    assert asked["local_files_only"] is False and asked["hub"] == "owner/any"
