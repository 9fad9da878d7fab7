"""Hosts on one machine: network namespaces around one that is the network between them, whose links can be cut.

The test's own process stands outside, connected like a host of its own. Everything is removed by `close`: processes,
links, namespaces; what a killed test run has left goes with the next one. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType

import psutil

from support.waiting import wait_until

_NAME = re.compile(r"kelp(\d+)[a-z]+")
_RELAY_TABLE = "100"
_NOBODY = 254
"""Last byte of an address that no host has."""


class NetworkUnavailable(Exception):
    """This machine lets nobody make networks."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise NetworkUnavailable(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@cache
def why_no_network() -> str | None:
    """What this machine lacks for namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install iproute2)"
    try:
        Network("try").close()
    except NetworkUnavailable as error:
        return f"network namespaces do not work here: {error}"
    return None


@dataclass(frozen=True)
class NetHost:
    """One host.

    Attributes:
        prefix: Begins the command line of a process that runs there.
        link: The network's end of its cable.
    """

    namespace: str
    address: str
    link: str
    prefix: tuple[str, ...] = field(default=())


class Network:
    """See the module docstring.

    Attributes:
        address: Of the network's own namespace, reachable from every host.
        prefix: Begins the command line of a process that runs there.
    """

    def __init__(self, *names: str) -> None:
        self._pid = os.getpid()
        self._remove_left_behind()
        self._core = self._namespace("net")
        self._subnet = f"198.18.{self._pid % 250}"
        self.address = f"{self._subnet}.1"
        self.prefix = ("ip", "netns", "exec", self._core)
        self._outside = f"kt{self._pid}"
        self._num_links = 0
        self.hosts: dict[str, NetHost] = {}
        try:
            _run("ip", "netns", "add", self._core)
            _run("ip", "-n", self._core, "link", "set", "lo", "up")
            _run("ip", "-n", self._core, "addr", "add", f"{self.address}/32", "dev", "lo")
            _run(*self.prefix, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            self._connect_outside()
            for name in names:
                self._add_host(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def cut(self, host: NetHost) -> None:
        """Take its link down: packets vanish, and nobody is told."""
        _run("ip", "-n", self._core, "link", "set", host.link, "down")

    def mend(self, host: NetHost) -> None:
        """The link is up again."""
        _run("ip", "-n", self._core, "link", "set", host.link, "up")

    def hide(self, host: NetHost) -> None:
        """What it sends to the network's own address, and to nobody else, vanishes."""
        nobody = f"{self._subnet}.{_NOBODY}"
        neighbour = ("lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent")
        _run("ip", "-n", host.namespace, "neigh", "replace", nobody, *neighbour)
        _run("ip", "-n", host.namespace, "route", "add", self.address, "via", nobody, "dev", "eth0", "onlink")

    def show(self, host: NetHost) -> None:
        """It arrives again."""
        _run("ip", "-n", host.namespace, "route", "del", self.address)

    def slow_down(self, host: NetHost, rate: str) -> None:
        """What it receives comes at `rate` at most (`256kbit` for example), and so does what it sends."""
        for namespace, device in ((self._core, host.link), (host.namespace, "eth0")):
            shaping = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", *shaping)

    def speed_up(self, host: NetHost) -> None:
        """As fast as ever."""
        for namespace, device in ((self._core, host.link), (host.namespace, "eth0")):
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", "del", "dev", device, "root")

    def divert(self, source: NetHost, target: NetHost, ports: list[int]) -> None:
        """What `source` sends to these ports of `target` is delivered in the network's own namespace."""
        _run("ip", "-n", self._core, "route", "replace", "local", target.address, "dev", "lo", "table", _RELAY_TABLE)
        for port in ports:
            _run("ip", "-n", self._core, "rule", "add", *self._diverted(source, target, port))

    def undivert(self, source: NetHost, target: NetHost, ports: list[int]) -> None:
        """It goes the whole way again."""
        for port in ports:
            _run("ip", "-n", self._core, "rule", "del", *self._diverted(source, target, port))

    def close(self) -> None:
        """Kill what runs in the namespaces and remove them; their links go with them, this one here at once."""
        with contextlib.suppress(NetworkUnavailable):
            _run("ip", "link", "del", self._outside)
        for namespace in (*(host.namespace for host in self.hosts.values()), self._core):
            _remove(namespace)

    def _diverted(self, source: NetHost, target: NetHost, port: int) -> tuple[str, ...]:
        match = ("iif", source.link, "to", target.address, "ipproto", "tcp", "dport", str(port))
        return (*match, "lookup", _RELAY_TABLE, "pref", "100")

    def _namespace(self, name: str) -> str:
        return f"kelp{self._pid}{name}"

    def _connect_outside(self) -> None:
        device, (own, gateway) = self._outside, self._next_addresses()
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", "out", "netns", self._core)
        _run("ip", "addr", "add", f"{own}/30", "dev", device)
        _run("ip", "link", "set", device, "up")
        self._raise_core_end("out", gateway)
        _run("ip", "route", "add", f"{self._subnet}.0/24", "via", gateway)

    def _add_host(self, name: str) -> None:
        namespace, link, (address, gateway) = self._namespace(name), f"to-{name}", self._next_addresses()
        host = NetHost(namespace, address, link, ("ip", "netns", "exec", namespace))
        self.hosts[name] = host
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", link, "netns", self._core)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{address}/30", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        self._raise_core_end(link, gateway)
        _run("ip", "-n", namespace, "route", "add", "default", "via", gateway)

    def _raise_core_end(self, link: str, gateway: str) -> None:
        _run("ip", "-n", self._core, "addr", "add", f"{gateway}/30", "dev", link)
        _run("ip", "-n", self._core, "link", "set", link, "up")

    def _next_addresses(self) -> tuple[str, str]:
        """A host's and its gateway's."""
        self._num_links += 1
        first = 4 * self._num_links
        return f"{self._subnet}.{first + 2}", f"{self._subnet}.{first + 1}"

    def _remove_left_behind(self) -> None:
        for line in _run("ip", "netns", "list").splitlines():
            found = _NAME.fullmatch(line.split()[0])
            if found is not None and not psutil.pid_exists(int(found[1])):
                _remove(found[0])


def _remove(namespace: str) -> None:
    with contextlib.suppress(NetworkUnavailable):
        for pid in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not _run("ip", "netns", "pids", namespace).strip(), f"an empty {namespace}", 30.0)
        _run("ip", "netns", "del", namespace)
