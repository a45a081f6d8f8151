"""The sweeps of the repository."""

from sparsecache.methods import make_method, parse_options


def test_every_sweep_names_methods_and_options_that_there_are(repo, load_script) -> None:
    files = sorted((repo / "configs" / "sweeps").glob("*.toml"))
    assert len(files) > 3
    for file in files:
        runs, _ = load_script("sweep").read_sweep(file)
        for run in runs:
            make_method(run.method, parse_options(run.method, dict(run.options)))
