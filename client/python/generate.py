"""Generates longspan/v1/*_pb2.py from the repository's proto folder: `python generate.py`.

google.rpc comes from googleapis-common-protos, so that other packages in one process share it.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
PROTO = HERE.parents[1] / "proto"


def generate() -> None:
    """Does nothing when the stubs are newer than every proto file."""
    protos = sorted((PROTO / "longspan" / "v1").glob("*.proto"))
    if not protos:
        raise FileNotFoundError(
            f"{PROTO}/longspan/v1 holds no .proto file: build from a full clone"
        )
    package = HERE / "longspan" / "v1"
    marker = package / "__init__.py"
    newest = max(path.stat().st_mtime for path in [*protos, pathlib.Path(__file__)])
    if marker.exists() and marker.stat().st_mtime > newest:
        return

    from grpc_tools import protoc

    package.mkdir(exist_ok=True)
    included = pathlib.Path(protoc.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTO}", f"-I{included}", f"--python_out={HERE}"]
    arguments += [f"--pyi_out={HERE}", f"--grpc_python_out={HERE}", *map(str, protos)]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; its messages are above")
    # Last, so that an interrupted run is repeated.
    marker.write_text('"""Generated messages and stubs of the package longspan.v1."""\n')


if __name__ == "__main__":
    sys.exit(generate())
