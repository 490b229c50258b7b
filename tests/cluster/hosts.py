"""Hosts with addresses of their own on one machine, joined by a switch, with ssh from each to all."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.cluster.machine import Machine, find, until, what_is_missing

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")

_SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PidFile none
UsePAM no
StrictModes no
"""
_SSH = """
User root
IdentityFile {folder}/key
BatchMode yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def missing() -> str:
    """Why there can be no hosts here, or an empty string."""
    return what_is_missing(PROGRAMS, trial="ip link add type bridge && ip link add type veth", network=True)


class Hosts:
    """The hosts run from `with` to the end of its block; `hosts["h1"]` is a `Machine`.

    They reach each other by name and nothing else, and see the same files. Programs on them have `environment`, unless
    told otherwise: its PATH begins with an `ssh` that lets root in by a key.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = ("h1", "h2")) -> None:
        self.folder = folder
        self.names = names
        self.environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}
        self._machines: dict[str, Machine] = {}

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def address(self, name: str) -> str:
        """A host's IPv4 address."""
        return f"10.77.0.{1 + self.names.index(name)}"

    def __enter__(self) -> Hosts:
        try:
            self._prepare_ssh()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _prepare_ssh(self) -> None:
        for key in ("host_key", "key"):
            line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(line, check=True, stdin=subprocess.DEVNULL)
        (self.folder / "sshd_config").write_text(_SSHD.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(_SSH.format(folder=self.folder))
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {find("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _start(self) -> None:
        known = [f"{self.address(name)} {name}" for name in self.names]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
        for name in ("switch", *self.names):
            self._machines[name] = Machine(name, self.folder / "hosts", self.environment, network=True)
        place = {name: f"netns /proc/{machine.pid}/ns/net" for name, machine in self._machines.items()}
        cables = [f"link add to-{name} {place['switch']} type veth peer eth0 {place[name]}\n" for name in self.names]
        subprocess.run([find("ip"), "-batch", "-"], input="".join(cables), text=True, check=True)
        plugs = [f"link set to-{name} master bridge up\n" for name in self.names]
        self["switch"].run(find("ip"), "-batch", "-", text="link add bridge up type bridge\n" + "".join(plugs))
        for name in self.names:
            settings = f"address add {self.address(name)}/24 dev eth0\nlink set eth0 up\nlink set lo up\n"
            self[name].run(find("ip"), "-batch", "-", text=settings)
            with (self.folder / f"sshd.{name}.log").open("wb") as log:
                self[name].start(find("sshd"), "-D", "-e", "-f", f"{self.folder}/sshd_config", stdout=log, stderr=log)
        until(lambda: all(self._reaches(self.names[0], name) for name in self.names), f"sshd (see {self.folder})")

    def _reaches(self, one: str, other: str) -> bool:
        line = ["ssh", "-o", "ConnectTimeout=5", other, "true"]
        return self[one].start(*line, stderr=subprocess.DEVNULL).wait(60) == 0

    def cut(self, name: str) -> None:
        """Pulls a host's cable: what is sent to it or by it is lost, and nobody is told."""
        self["switch"].run(find("ip"), "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Puts the cable back, and waits until the hosts have noticed."""
        self["switch"].run(find("ip"), "link", "set", f"to-{name}", "up")
        until(lambda: all(self._reaches(other, name) for other in self.names), f"{name} to be reached again")

    def stop(self) -> None:
        """Ends every process on the hosts, and with them their networks and mounts."""
        for machine in self._machines.values():
            machine.kill()
