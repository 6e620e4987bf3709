"""The least that a backup of a folder can cost: zstd 1, BLAKE3 and AES-256-GCM alone, on one thread, 512 KiB at a time.

Run as a program with a folder and by a Python that has `zstandard`, `blake3` and `cryptography`; prints CPU seconds, wall
seconds and MiB that would be stored. Files are read, one after the other, before the clock runs.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from measure import Row

PIECE, SLAB = 512 << 10, 256 << 20  # bytes
NAME = "zstd+hash+cipher alone"
PACKAGES = ["zstandard==0.25.0", "blake3==1.0.11", "cryptography==50.0.2"]


def measure(cache: Path, data_set: str, folder: Path) -> Row:
    """Runs this file by a Python in the cache that has what it needs."""
    venv = cache / "floor"
    done = venv / ".installed"
    if not done.exists():
        subprocess.run(["python3", "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
        done.touch()
    said = subprocess.run([venv / "bin" / "python", __file__, folder], stdout=subprocess.PIPE, text=True, check=True).stdout
    cpu, wall, stored = (float(word) for word in said.split())
    return Row(data_set, "first", NAME, cpu, wall, 0, stored)


def slabs(folder: Path):
    """The bytes of all files, concatenated, in parts of about `SLAB`."""
    held = bytearray()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            held += path.read_bytes()
            while len(held) >= SLAB:
                yield held[:SLAB]
                held = held[SLAB:]
    yield held


def main() -> None:
    import blake3
    import zstandard
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key, compressor, cpu, wall, stored = os.urandom(32), zstandard.ZstdCompressor(level=1), 0.0, 0.0, 0
    cipher = AESGCM(key)
    for slab in slabs(Path(sys.argv[1])):
        view, began = memoryview(slab), (time.process_time(), time.monotonic())
        for number, start in enumerate(range(0, len(view), PIECE)):
            piece = view[start : start + PIECE]
            blake3.blake3(piece, key=key).digest()
            stored += len(cipher.encrypt(number.to_bytes(12), compressor.compress(piece), None))
        cpu, wall = cpu + time.process_time() - began[0], wall + time.monotonic() - began[1]
    print(cpu, wall, stored / (1 << 20))


if __name__ == "__main__":
    main()
