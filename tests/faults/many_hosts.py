"""Three hosts with a `kelp serve` of mock workers each, what is asked of them, and what they then must know."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.executor.mock.language import Vocabulary
from kelp.text.tokenizer import Tokenizer
from support.etcd_server import EtcdServer
from support.host_server import HostServer
from support.index_check import blocks_held
from support.llm_client import Call, Response
from support.net_hosts import Network
from support.serving import MODEL
from support.waiting import wait_until

LONG_TOKENS = 600
"""More than five seconds of the mock's steps."""
_numbers = itertools.count()


class Hosts(NamedTuple):
    """All of it; `near` is asked, `far` is what happens to somebody, `third` looks on."""

    network: Network
    etcd: EtcdServer
    near: HostServer
    far: HostServer
    third: HostServer

    @property
    def servers(self) -> tuple[HostServer, ...]:
        return self.near, self.far, self.third

    def worker(self, host: HostServer) -> str:
        return f"{host.grpc_endpoint}/decode"

    def starts(self, questions: Iterable[str]) -> list[set[str]]:
        """Which workers have begun each question, as the workers themselves say: they keep its blocks."""
        records = self.near.all_records()
        seed = seed_hash(records[0].layout.model_id)
        block_size = records[0].layout.block_size
        names = [sequence_hashes(_language()[0].encode(question), block_size, seed) for question in questions]
        assert all(names), "a question shorter than a block"
        return [set(held) for held in blocks_held(records, names, self.near.peer_token)]

    def converge(self) -> None:
        """Every router comes to know the other routers, all workers, and what each worker holds."""
        for asked in self.servers:
            name = f"look {next(_numbers)}"
            asked.generate(text_input=prompt(), id=name)
            for other in self.servers:
                wait_until(lambda o=other, n=name: o.explain(n), "each router to know the others", 30.0)  # type: ignore[misc]
        questions = {holder: prompt() for holder in self.servers}
        for holder, question in questions.items():
            self.near.generate(text_input=question, kelp_worker=self.worker(holder))
        for server, (holder, question) in itertools.product(self.servers, questions.items()):
            wait_until(
                lambda s=server, h=holder, q=question: self._sees(s, h, q),  # type: ignore[misc]
                "each router to know what each worker holds",
                30.0,
            )

    def _sees(self, server: HostServer, holder: HostServer, question: str) -> bool:
        """Whether a router expects the question's blocks at a worker."""
        worker, name = self.worker(holder), f"look {next(_numbers)}"
        server.generate(text_input=question, id=name, kelp_worker=worker)
        (seen,) = server.explain(name)["choices"][0]["candidates"]
        return bool(seen["worker_id"] == worker and seen["overlap_blocks"][0] > 0)

    def overlaps(self, server: HostServer, question: str) -> set[str]:
        """Where a router expects the question's blocks, and it expects them among all workers."""
        name = f"look {next(_numbers)}"
        server.generate(text_input=question, id=name)
        candidates = server.explain(name)["choices"][0]["candidates"]
        assert {each["worker_id"] for each in candidates} == {self.worker(each) for each in self.servers}
        return {each["worker_id"] for each in candidates if each["overlap_blocks"][0] > 0}


@cache
def _language() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer(MODEL)
    return tokenizer, Vocabulary(tokenizer.vocab_size, tuple(sorted(tokenizer.eos_token_ids)))


def said(question: str, num_tokens: int) -> list[int]:
    """What the mock says to a prompt."""
    tokenizer, vocabulary = _language()
    return vocabulary.continuation(tokenizer.encode(question), num_tokens)


def prompt() -> str:
    """A new one, of a few blocks."""
    return f"Ship {next(_numbers)} left the harbour with salt and oranges, " + "and came back with silk and pepper " * 4


class Load:
    """Requests to some hosts without a pause; every answer is compared."""

    def __init__(self, servers: tuple[HostServer, ...]) -> None:
        self._questions = [prompt() for _ in range(4)]
        self._expected = [said(question, 24) for question in self._questions]
        self._end = threading.Event()
        self.num_right = 0
        self.wrong: list[object] = []
        self._threads = [threading.Thread(target=self._run, args=(server,), daemon=True) for server in servers]
        for thread in self._threads:
            thread.start()

    def _run(self, server: HostServer) -> None:
        for number in itertools.cycle(range(len(self._questions))):
            if self._end.is_set():
                return
            try:
                tokens = server.ask(text_input=self._questions[number], max_tokens=24).token_ids
            except Exception as error:
                self.wrong.append(error)
                return
            if tokens == self._expected[number]:
                self.num_right += 1
            else:
                self.wrong.append(tokens)

    def wait(self, count: int) -> None:
        """So many more answers."""
        goal = self.num_right + count
        wait_until(lambda: self.num_right >= goal or bool(self.wrong), f"{count} more answers", 60.0)

    def stop(self) -> None:
        """All answers were right."""
        self._end.set()
        for thread in self._threads:
            thread.join(60.0)
        assert not self.wrong, self.wrong


class Streams:
    """Long streams under way, some from each of several routers; each has had its first response."""

    def __init__(self, servers: tuple[HostServer, ...], count_each: int) -> None:
        self._calls: dict[str, tuple[HostServer, str, Call, list[Response]]] = {}
        for server in servers:
            for _ in range(count_each):
                question, name = prompt(), f"stream {next(_numbers)}"
                fields = {"text_input": question, "max_tokens": LONG_TOKENS, "ignore_eos": True, "stream": True}
                call = Call(server.grpc_endpoint, fields, request_id=name)
                self._calls[name] = server, question, call, []
        for _, _, call, responses in self._calls.values():
            responses.append(call.next())

    @property
    def questions(self) -> list[str]:
        return [question for _, question, _, _ in self._calls.values()]

    def finish(self) -> None:
        """To their ends: no token missing, none twice."""

        def rest(name: str) -> None:
            _, question, call, responses = self._calls[name]
            responses.extend(call)
            assert [token for each in responses for token in each.token_ids] == said(question, LONG_TOKENS)
            assert responses[-1].number("num_output_tokens") == LONG_TOKENS

        with ThreadPoolExecutor(len(self._calls)) as pool:
            list(pool.map(rest, self._calls))
        self.cancel()

    def attempts(self) -> dict[str, int]:
        """How often each question was placed, as its router says."""
        return {question: server.explain(name)["attempt"] for name, (server, question, _, _) in self._calls.items()}

    def asked_of(self, server: HostServer) -> list[str]:
        """Those of one router."""
        return [question for asked, question, _, _ in self._calls.values() if asked is server]

    def cancel(self) -> None:
        """End what still runs, and all connections."""
        for _, _, call, _ in self._calls.values():
            call.cancel()


def by_router(hosts: Hosts, questions: Iterable[str]) -> dict[HostServer, list[str]]:
    """The questions shared out among the routers."""
    shared: defaultdict[HostServer, list[str]] = defaultdict(list)
    for server, question in zip(itertools.cycle(hosts.servers), questions, strict=False):
        shared[server].append(question)
    return shared
