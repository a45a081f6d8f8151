"""Wait until so many machines have joined the Ray cluster at $RAY_ADDRESS: scripts/await_cluster.py MACHINES."""

import sys
import time

import click

from sparsecache.cli import report_usage_errors
from sparsecache.cluster.connection import Cluster
from sparsecache.errors import UsageError


@click.command()
@click.argument("machines", type=click.IntRange(1))
@click.option("--seconds", default=300.0, show_default=True, help="How long to wait.")
def main(machines: int, seconds: float) -> None:
    """Wait until MACHINES have joined; exit with 2 if they do not."""
    deadline = time.monotonic() + seconds
    with report_usage_errors(), Cluster("auto") as cluster:
        while (there := _machines(cluster)) < machines:
            if time.monotonic() > deadline:
                raise UsageError(f"{there} of {machines} machines joined the Ray cluster within {seconds:.0f} s.")
            time.sleep(1)
    click.echo(f"{there} machines have joined the Ray cluster.")
    sys.exit(0)


def _machines(cluster: Cluster) -> int:
    try:
        cluster.connect()
    except UsageError:  # its head is not up yet
        return 0
    return cluster.machines


if __name__ == "__main__":
    main()
