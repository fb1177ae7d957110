"""The module names of KVBM's connector, for engines whose configuration cannot be changed.

    python -m kvbm_connector.dynamo_names install
    python -m kvbm_connector.dynamo_names remove

puts `kvbm.trtllm_integration.connector` and `dynamo.llm.trtllm_integration.connector` beside this package, or takes them
away. Where the originals are installed, nothing is put: two packages of one name would be a lottery.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import shutil
import sys

_MARK = "kvbm-connector-names"
_MODULES = ("kvbm.trtllm_integration.connector", "dynamo.llm.trtllm_integration.connector")
_CODE = '''"""Another name of kvbm_connector.trtllm. Made by kvbm_connector.dynamo_names."""

from kvbm_connector.trtllm import DynamoKVBMConnectorLeader, DynamoKVBMConnectorWorker

__all__ = ["DynamoKVBMConnectorLeader", "DynamoKVBMConnectorWorker"]
'''


def _tops(site: pathlib.Path) -> list[pathlib.Path]:
    return [site / module.split(".")[0] for module in _MODULES]


def _ours(top: pathlib.Path) -> bool:
    return (top / _MARK).is_file()


def install(site: pathlib.Path) -> None:
    """Puts the modules into `site`, or raises FileExistsError and puts nothing."""
    for top in _tops(site):
        spec = importlib.util.find_spec(top.name)
        places = list(spec.submodule_search_locations or [spec.origin]) if spec else []
        foreign = [place for place in places if not _ours(pathlib.Path(place))]
        if foreign or (top.exists() and not _ours(top)):
            where = foreign[0] if foreign else top
            raise FileExistsError(
                f"{top.name} is installed already, at {where}: uninstall it, or name kvbm_connector.trtllm in "
                "kv_connector_config, which needs none of this"
            )
    for module in _MODULES:
        folder = site
        for name in module.split("."):
            folder = folder / name
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(_CODE)
        (site / module.split(".")[0] / _MARK).write_text("")


def remove(site: pathlib.Path) -> None:
    """Takes away what `install` put, and nothing else."""
    for top in _tops(site):
        if _ours(top):
            shutil.rmtree(top)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvbm_connector.dynamo_names", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("install", "remove"))
    what = parser.parse_args().what
    site = pathlib.Path(__file__).resolve().parent.parent
    try:
        install(site) if what == "install" else remove(site)
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
