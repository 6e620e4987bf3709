"""An S3 server whose answers take 30 ms longer: versitygw behind a proxy that delays what passes. Here on the loopback alone."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import steps
import tools
from measure import Bench, Where

DELAY = 0.015  # seconds, each way
BUCKET = "bench"
LOCAL = "127.0.0.1"
PROGRAM = "LIFEBOAT_S3_VERSITYGW"  # what names the server's program; e2e/bin/with-programs sets it
CHUNK, CHUNKS_UNDERWAY = 256 << 10, 256  # bytes of a read, and how many of them wait at most per direction
# Ends the first line of a request, and nothing else that a client sends: bodies are encrypted.
REQUEST = b" HTTP/1.1\r\n"


class Proxy:
    """Passes bytes on after `DELAY`, any number of them under way, and counts requests. Runs on a thread of its own."""

    def __init__(self, port: int):
        self.target = port
        self.requests = 0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.connection, LOCAL, 0, limit=CHUNK))
        self.port = self.server.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.run_until_complete(self.hang_up())
        self.loop.close()

    async def hang_up(self) -> None:
        """Ends the connections that clients left open."""
        self.server.close()
        open_ones = asyncio.all_tasks() - {asyncio.current_task()}
        for one in open_ones:
            one.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * DELAY)  # a connection takes a round trip to open
        inner_reader, inner_writer = await asyncio.open_connection(LOCAL, self.target, limit=CHUNK)
        try:
            await asyncio.gather(self.direction(reader, inner_writer, True), self.direction(inner_reader, writer, False))
        except (ConnectionError, asyncio.CancelledError):
            pass  # one side is gone, or the proxy ends: the other side learns it by the close
        finally:
            writer.close()
            inner_writer.close()

    async def direction(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        underway: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_UNDERWAY)
        await asyncio.gather(self.take(reader, underway, counted), self.give(underway, writer))

    async def take(self, reader: asyncio.StreamReader, underway: asyncio.Queue, counted: bool) -> None:
        before = b""
        while True:
            chunk = await reader.read(CHUNK)
            if counted:
                self.requests += (before + chunk).count(REQUEST)
                before = (before + chunk)[1 - len(REQUEST) :]
            await underway.put((self.loop.time() + DELAY, chunk))
            if not chunk:
                return

    async def give(self, underway: asyncio.Queue, writer: asyncio.StreamWriter) -> None:
        while True:
            due, chunk = await underway.get()
            await asyncio.sleep(due - self.loop.time())
            if not chunk:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()


@contextmanager
def server(program: str, folder: Path) -> Iterator[int]:
    """versitygw with one bucket below `folder`; its port."""
    for name in (f"data/{BUCKET}", "iam"):
        (folder / name).mkdir(parents=True)
    with socket.socket() as free:
        free.bind((LOCAL, 0))
        port = free.getsockname()[1]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            # Connections stay open, as with every other S3 server; by default this one closes them after each answer.
            [program, "--port", f"{LOCAL}:{port}", "--keep-alive", "--quiet", "--iam-dir", folder / "iam", "posix", folder / "data"],
            env={**os.environ, "ROOT_ACCESS_KEY": tools.S3_KEY, "ROOT_SECRET_KEY": tools.S3_SECRET}, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex((LOCAL, port)) == 0:
                    break
            time.sleep(0.05)
        else:
            sys.exit(f"{program} did not start:\n{log.read_text(errors='replace')}")
        yield port
    finally:
        process.terminate()
        process.wait()


def over_s3(bench: Bench, found: list[tools.Tool], source: Path) -> None:
    """First backup, unchanged and restore of *tree* through the proxy, for all programs that know S3."""
    program = os.environ.get(PROGRAM, "")
    if not os.access(program, os.X_OK):
        bench.left_out.append(f"S3: there is no server; {PROGRAM} names none that can be run.")
        return
    folder = bench.work / "s3"
    with server(program, folder) as port:
        proxy = Proxy(port)
        try:
            where = Where(", S3", bucket=folder / "data" / BUCKET, requests=lambda: proxy.requests)
            for tool in found:
                remote = tool.on_s3(f"{LOCAL}:{proxy.port}", BUCKET)
                if remote is None:
                    bench.left_out.append(f"S3: {tool.name} cannot do it.")
                    continue
                steps.basic(bench, remote, "tree", source, where)
                shutil.rmtree(where.bucket / tool.name)
                bench.drop([tool], "tree, S3")
        finally:
            proxy.stop()
