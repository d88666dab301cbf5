"""A real Kafka broker for tests: one KRaft node on loopback, its jars from Maven Central into a cache folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import uuid
from pathlib import Path

from mtl.session import jars_folder

VERSION = "4.1.2"
ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oracle-mtl" / f"kafka-{VERSION}"
IVY = f"""<ivy-module version="2.0">
  <info organisation="oracle-mtl" module="broker"/>
  <dependencies><dependency org="org.apache.kafka" name="kafka_2.13" rev="{VERSION}" conf="default"/></dependencies>
</ivy-module>"""
PROPERTIES = """process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder}/log
num.partitions=2
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
"""


class Unavailable(Exception):
    """There is no broker to be had; the message says why."""


def fetch(java: str) -> Path:
    """The folder of the broker's jars, fetched once.

    Raises:
        Unavailable: Maven Central cannot be reached.
    """
    jars = CACHE / "jars"
    if not jars.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / "ivy.xml").write_text(IVY)
        ivy = next(jars_folder().glob("ivy-*.jar"))
        part = CACHE / f"part-{os.getpid()}"
        command = [java, f"-Duser.home={CACHE}", "-jar", str(ivy), "-settings", str(ROOT / "conf" / "ivysettings.xml")]
        command += [
            "-cache",
            str(CACHE / "ivy"),
            "-ivy",
            str(CACHE / "ivy.xml"),
            "-confs",
            "default",
            "-types",
            "jar",
            "bundle",
        ]
        command += ["-retrieve", f"{part}/[artifact]-[revision].[ext]"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            raise Unavailable("fetching Kafka's broker from Maven Central took over 120 s") from None
        bad = "UNRESOLVED" in done.stdout or "FAILED DOWNLOADS" in done.stdout
        if bad or not (part / f"kafka_2.13-{VERSION}.jar").exists():
            raise Unavailable(f"cannot fetch Kafka's broker from Maven Central: {done.stdout[-200:]}")
        part.rename(jars)
    return jars


class Broker:
    """One broker in ``folder``; it can be killed and started again on the same port and log."""

    def __init__(self, java: str, folder: Path):
        self.java, self.folder, self.classpath = java, folder, f"{fetch(java)}/*"
        self.port, controller = _free_ports(2)
        self.process: subprocess.Popen | None = None
        self.properties = folder / "server.properties"
        self.properties.write_text(PROPERTIES.format(port=self.port, controller=controller, folder=folder))
        name = uuid.uuid4().hex[:22]
        self._run("kafka.tools.StorageTool", "format", "-t", name, "-c", str(self.properties)).wait(60)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = self._run("kafka.Kafka", str(self.properties))
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise Unavailable(f"the broker does not listen: {(self.folder / 'broker.log').read_text()[-500:]}")

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def _run(self, *arguments: str) -> subprocess.Popen:
        log = open(self.folder / "broker.log", "ab")  # noqa: SIM115
        command = [self.java, "-Xmx384m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", self.classpath]
        return subprocess.Popen([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
