"""A plugin of `buf generate`: makes the gRPC stubs and the package markers of `gen/`.

buf runs it as buf.gen.yaml says, with a CodeGeneratorRequest on standard input, and takes a CodeGeneratorResponse
from its standard output.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorSet


def generate(request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """A `*_pb2_grpc.py` for each file, and an empty `__init__.py` for each folder that has or leads to one."""
    response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
    files = list(request.file_to_generate)
    with TemporaryDirectory() as folder:
        descriptors, out = Path(folder, "descriptors.binpb"), Path(folder, "out")
        descriptors.write_bytes(FileDescriptorSet(file=request.proto_file).SerializeToString())
        out.mkdir()
        # The gRPC plugin is inside grpc_tools' protoc, where buf cannot call it.
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--descriptor_set_in={descriptors}"]
        command.append(f"--grpc_python_out={out}")
        subprocess.run(command + files, check=True)
        for path in sorted(out.rglob("*.py")):
            response.file.add(name=path.relative_to(out).as_posix(), content=path.read_text(encoding="utf-8"))
    packages = {parent for name in files for parent in PurePosixPath(name).parents} - {PurePosixPath()}
    for package in sorted(packages):
        response.file.add(name=str(package / "__init__.py"))
    return response


if __name__ == "__main__":
    sys.stdout.buffer.write(generate(CodeGeneratorRequest.FromString(sys.stdin.buffer.read())).SerializeToString())
