"""The openai engine against a real server that answers, refuses, breaks and hangs up."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from served import Call, Reply, Served, after, answer, echo, serve, text_of

from misstep.engines.base import Completion, Request
from misstep.engines.cached import MANY, CachedEngine, Chosen
from misstep.engines.choose import choose
from misstep.engines.openai import Fault, OpenAIEngine, Patience, read, retry_after
from misstep.errors import EngineError, ModelError
from misstep.models.endpoint import Endpoint, check_endpoint, parse_endpoint
from misstep.models.locate import locate
from misstep.records import Message

pytest.importorskip("openai")

QUICK = Patience(tries=6, first_wait=0.001, longest_wait=5)
Given = tuple[int, Reply, dict[str, str]]


def ask(text: str, **options: Any) -> Request:
    return Request(messages=(Message(role="user", content=text),), **options)


def asks(count: int) -> list[Request]:
    return [ask(f"question {i}", seed=i) for i in range(count)]


def engine(served: Served, patience: Patience = QUICK) -> OpenAIEngine:
    return OpenAIEngine(Endpoint("m", served.url), patience)


def same(opened: OpenAIEngine) -> OpenAIEngine:
    return opened


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_what_is_asked_is_passed_on() -> None:
    request = Request(
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content="Hi"),
        ),
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=123,
    )
    with serve() as served, engine(served) as opened:
        opened.generate([request])
    assert served.calls == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
            ],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 123,
        }
    ]


def test_the_end_of_an_answer_is_read() -> None:
    def reply(call: Call) -> Given:
        finish = "length" if text_of(call) == "long" else "stop"
        return 200, answer("one two", 2, finish), {}

    with serve(reply) as served, engine(served) as opened:
        long, short = opened.generate([ask("long"), ask("short")])
    assert long == Completion(text="one two", tokens=2, truncated=True)
    assert short == Completion(text="one two", tokens=2)


def test_order_is_kept_however_late_an_answer_comes() -> None:
    dice = random.Random(0)
    with (
        serve(lambda call: after(dice.random() / 50, call)) as served,
        engine(served) as opened,
    ):
        found = opened.generate(asks(60))
    assert texts(found) == [f"question {i}" for i in range(60)]


def faults(served: list[Served], share: float) -> Any:
    """A reply that misbehaves in its share of first tries, in all five ways."""
    dice, lock = random.Random(1), threading.Lock()

    def reply(call: Call) -> Given:
        with lock:
            drawn, kind = dice.random(), dice.randrange(5)
        if served[0].number(call) > 1 or drawn > share:
            return echo(call)
        return (
            (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
            (500, {"error": {"message": "oops"}}, {}),
            (200, b'{"choices": [{"mess', {}),
            (200, {"choices": []}, {}),
            (200, None, {}),
        )[kind]

    return reply


def test_with_a_third_of_the_tries_at_fault_all_are_answered_once() -> None:
    known: list[Served] = []
    with serve(faults(known, 0.3)) as served, engine(served) as opened:
        known.append(served)
        found = opened.generate(asks(200))
    assert texts(found) == [f"question {i}" for i in range(200)]
    assert not any(completion.error for completion in found)
    # As many calls as questions and faults: nothing that was answered is asked again.
    assert all(n <= 2 for n in served.tries.values())
    assert 230 < len(served.calls) < 290


def test_a_hopeless_request_is_a_record_and_the_others_go_on() -> None:
    def reply(call: Call) -> Given:
        return {
            "too long": (400, {"error": {"message": "context\nlength"}}, {}),
            "broken": (500, {"error": {"message": "oops"}}, {}),
            "withheld": (200, answer("", finish="content_filter"), {}),
        }.get(text_of(call), echo(call))

    with serve(reply) as served, engine(served) as opened:
        names = ["a", "too long", "b", "broken", "withheld", "c"]
        found = opened.generate([ask(name) for name in names])
    errors = {name: c.error for name, c in zip(names, found, strict=True) if c.error}
    assert texts(found) == ["a", "", "b", "", "", "c"]
    assert sorted(errors) == ["broken", "too long", "withheld"]
    assert "status 400" in str(errors["too long"]) and "\n" not in str(errors["too long"])
    assert "status 500" in str(errors["broken"])
    assert "tried 6 times" in str(errors["broken"])
    asked = [text_of(call) for call in served.calls]
    assert asked.count("broken") == 6
    assert asked.count("too long") == asked.count("withheld") == 1


def said(message: dict[str, Any], finish: str | None = "stop", tokens: int | None = 3) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": None}, "found nothing"),
        ({"content": None, "reasoning_content": "Hm."}, "found reasoning_content"),
        ({"content": "", "reasoning": "Hm."}, "found reasoning"),
        ({"content": "", "refusal": "I cannot help."}, "found refusal"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "found tool_calls"),
        ({"content": [{"type": "thinking", "thinking": []}], "reasoning": "Hm."}, "reasoning"),
    ],
)
def test_an_answer_without_a_text_is_none(message: dict[str, Any], reason: str) -> None:
    found = read(said(message))
    assert isinstance(found, Fault)
    assert (found.kind, reason in found.reason) == ("refused", True)
    cut = read(said(message, "length"))
    assert isinstance(cut, Fault) and "max_tokens" in cut.reason


@pytest.mark.parametrize("finish", ["error", "abort", "insufficient_system_resource"])
def test_an_answer_that_broke_off_is_tried_again(finish: str) -> None:
    found = read(said({"content": "Half an ans"}, finish))
    assert isinstance(found, Fault) and found.kind == "broken"
    assert finish in found.reason


def test_ends_are_known_by_the_names_that_servers_give_them() -> None:
    for finish in ("length", "MAX_TOKENS", "model_length"):
        assert read(said({"content": "Half"}, finish)) == Completion(
            text="Half", tokens=3, truncated=True
        )
    for end in ("STOP", "eos_token", "end_turn", None):
        assert read(said({"content": "Whole."}, end)) == Completion(text="Whole.", tokens=3)
    for finish in ("content_filter: SAFETY", "SAFETY", "content_filter"):
        found = read(said({"content": "Half"}, finish))
        assert isinstance(found, Fault) and found.kind == "refused"


def test_hidden_thoughts_that_leave_no_room_for_an_answer_are_none() -> None:
    found = read(said({"content": "", "refusal": None}, "length"))
    assert isinstance(found, Fault) and found.kind == "refused"
    assert "none within max_tokens: ask for more" in found.reason


def test_a_prompt_to_which_a_server_never_gives_a_choice_is_a_record() -> None:
    blocked = {"choices": [], "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}

    def reply(call: Call) -> Given:
        return (200, blocked, {}) if "1" in text_of(call) else echo(call)

    with serve(reply) as served, engine(served) as opened:
        found = opened.generate(asks(40))
    lost = [place for place, completion in enumerate(found) if completion.error]
    assert lost == [place for place in range(40) if "1" in str(place)]
    assert all("found no choice" in str(found[place].error) for place in lost)
    assert len(served.calls) == 40 + 2 * len(lost)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "", "refusal": None, "tool_calls": []}, ""),
        ({"content": "Yes.", "reasoning_content": "Hm."}, "Yes."),
        (
            {
                "content": [
                    {"type": "reasoning", "text": "Hm."},
                    {"type": "text", "text": "Yes, "},
                    {"type": "text", "text": "it is."},
                ]
            },
            "Yes, it is.",
        ),
    ],
)
def test_a_text_is_read_whatever_stands_beside_it(message: dict[str, Any], text: str) -> None:
    assert read(said(message)) == Completion(text=text, tokens=3)
    assert read(said(message, tokens=None)) == Completion(text=text, tokens=0)


def unsupported(name: str, words: str) -> Given:
    """As api.openai.com words it; other servers leave `param` and `code` out."""
    fault = {"message": words, "type": "invalid_request_error", "param": name, "code": "x"}
    return 400, {"error": fault}, {}


UNSUPPORTED = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only "
    "the default (1) value is supported.",
    "top_p": "Unsupported parameter: 'top_p' is not supported with this model.",
    "seed": "Unrecognized request argument supplied: seed",
}


@pytest.mark.parametrize("by_param", [True, False])
def test_a_setting_that_the_server_does_not_support_is_left_out_and_said_once(
    by_param: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(call: Call) -> Given:
        for name, words in UNSUPPORTED.items():
            if name in call:
                status, body, headers = unsupported(name, words)
                assert isinstance(body, dict)
                return status, body if by_param else {"error": {"message": words}}, headers
        return echo(call)

    with serve(reply) as served, engine(served) as opened:
        assert texts(opened.generate(asks(20))) == [f"question {i}" for i in range(20)]
        before = len(served.calls)
        assert texts(opened.generate(asks(9))) == [f"question {i}" for i in range(9)]
    assert len(served.calls) == before + 9, "what was learnt holds for later calls"
    assert set(served.calls[-1]) == {"model", "messages", "max_completion_tokens"}
    told = capsys.readouterr().err
    assert [told.count(f"does not support {name};") for name in UNSUPPORTED] == [1] * 4


@pytest.mark.parametrize(
    ("words", "refused", "gone"),
    [
        (
            "`temperature` and `top_p` cannot both be specified.",
            {"temperature", "top_p"},
            "top_p",
        ),
        ("`temperature` is deprecated for this model.", {"temperature"}, "temperature"),
    ],
)
def test_of_two_settings_that_exclude_each_other_the_temperature_stays(
    words: str, refused: set[str], gone: str
) -> None:
    def reply(call: Call) -> Given:
        return (400, {"error": {"message": words}}, {}) if refused <= set(call) else echo(call)

    with serve(reply) as served, engine(served) as opened:
        assert texts(opened.generate(asks(3))) == [f"question {i}" for i in range(3)]
    settings = {"max_tokens", "temperature", "top_p", "seed"} - {gone}
    assert set(served.calls[-1]) == {"model", "messages", *settings}


def test_a_value_that_is_wrong_is_not_left_out() -> None:
    words = "max_tokens is too large: 5000. This model supports at most 4096 completion tokens."
    with serve(lambda _: unsupported("max_tokens", words)) as served:
        with engine(served) as opened, pytest.raises(EngineError, match="at most 4096"):
            opened.generate(asks(3))
    assert all("max_tokens" in call for call in served.calls)


@pytest.mark.parametrize("status", [400, 403, 422])
@pytest.mark.parametrize("count", [1, 30])
def test_a_server_that_refuses_every_request_ends_the_run(status: int, count: int) -> None:
    with serve(lambda _: (status, {"error": {"message": "not today"}}, {})) as served:
        with (
            engine(served) as opened,
            pytest.raises(EngineError, match=f"status {status}.*not today"),
        ):
            opened.generate(asks(count))
    assert len(served.calls) == count + 1


def test_requests_that_are_all_refused_for_their_own_sake_are_records() -> None:
    def reply(call: Call) -> Given:
        return (400, {"error": {"message": "no"}}, {}) if "qu" in text_of(call) else echo(call)

    turns = (Message(role="system", content="quiet"), Message(role="user", content="question"))
    with serve(reply) as served, engine(served) as opened:
        found = opened.generate([Request(messages=turns, max_tokens=5)] * 2)
    assert all("status 400" in str(completion.error) for completion in found)
    plain = served.calls[-1]
    assert [turn["role"] for turn in plain["messages"]] == ["system", "user"]
    assert plain["max_tokens"] == 5, "all but the texts is as it was refused"


def test_failures_are_not_kept_and_the_next_run_asks_again(tmp_path: Path) -> None:
    down = [True]

    def reply(call: Call) -> Given:
        if text_of(call) == "question 1" and down[0]:
            return 400, {"error": {"message": "no"}}, {}
        return echo(call)

    with serve(reply) as served:
        for expected in (["question 0", "", "question 2"], [f"question {i}" for i in range(3)]):
            real = engine(served)
            with CachedEngine(
                Chosen(real.identity, "", partial(same, real)), tmp_path / "c"
            ) as cached:
                assert texts(cached.generate(asks(3))) == expected
            down[0] = False
    assert sorted(map(text_of, served.calls)) == [
        "question 0",
        "question 1",
        "question 1",
        "question 2",
    ]


def test_nobody_begins_before_the_time_that_the_server_gives() -> None:
    times: list[float] = []

    def reply(call: Call) -> Given:
        times.append(time.monotonic())
        if len(times) == 1:
            return 429, {"error": {"message": "wait"}}, {"Retry-After": "0.6"}
        return echo(call)

    with serve(reply) as served, engine(served) as opened:
        opened.pace.limit = 1
        found = opened.generate(asks(3))
    assert texts(found) == [f"question {i}" for i in range(3)]
    assert times[1] - times[0] >= 0.6


def test_a_server_that_asks_for_no_wait_is_not_asked_all_at_once() -> None:
    begun = time.monotonic()

    def reply(call: Call) -> Given:
        if time.monotonic() - begun < 0.5:
            return 429, {"error": {"message": "wait"}}, {"Retry-After": "0"}
        return echo(call)

    with serve(reply) as served, engine(served, Patience(first_wait=0.05)) as opened:
        found = opened.generate(asks(3))
    assert texts(found) == [f"question {i}" for i in range(3)]


def test_a_server_that_wants_too_long_a_wait_is_not_waited_for() -> None:
    def reply(_: Call) -> Given:
        return 429, {"error": {}}, {"Retry-After": "3600"}

    with serve(reply) as served:
        with engine(served, Patience(longest_wait=0.01)) as opened:
            (found,) = opened.generate(asks(1))
    assert found.error and "status 429" in found.error
    assert len(served.calls) == 1


def test_a_server_that_hangs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("misstep.engines.openai.SECONDS", 0.3)
    known: list[Served] = []

    def reply(call: Call) -> Given:
        return after(2, call) if known[0].number(call) == 1 else echo(call)

    with serve(reply) as served, engine(served) as opened:
        known.append(served)
        (found,) = opened.generate(asks(1))
    assert found.text == "question 0" and len(served.calls) == 2


def test_what_fails_for_all_waits_for_no_request_under_way() -> None:
    def reply(call: Call) -> Given:
        if text_of(call) == "question 2":
            return 402, {"error": {"message": "x"}}, {}
        return after(30, call)

    with serve(reply) as served, engine(served) as opened:
        started = time.monotonic()
        with pytest.raises(EngineError, match="nothing left"):
            opened.generate(asks(4))
        assert time.monotonic() - started < 20


def test_ctrl_c_waits_for_no_request_under_way() -> None:
    code = (
        # A background job of a shell ignores the signal, and so would what it starts.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from misstep.models.endpoint import Endpoint; "
        "from misstep.engines.base import Request; from misstep.records import Message; "
        "from misstep.engines.openai import OpenAIEngine\n"
        "with OpenAIEngine(Endpoint('m', sys.argv[1])) as engine:\n"
        "    engine.generate([Request(messages=(Message(role='user', content='x'),))])"
    )
    with serve(lambda call: after(60, call)) as served:
        run = subprocess.Popen(
            [sys.executable, "-c", code, served.url], stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 30
        while not served.running and time.monotonic() < until:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) != 0


def test_waits_are_read_in_all_three_forms() -> None:
    now = 1_800_000_000.0
    date = formatdate(now + 30, usegmt=True)
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}, now) == 0.25
    assert retry_after({"retry-after": "1.5"}, now) == 1.5
    assert retry_after({"retry-after": date}, now) == 30
    assert retry_after({"retry-after": "soon"}, now) is None
    assert retry_after({}, now) is None


def test_an_endpoint_that_answers_nobody_is_given_up() -> None:
    def reply(_: Call) -> Given:
        return 500, {"error": {"message": "out of memory"}}, {}

    patience = Patience(tries=2, first_wait=0.001, in_a_row=5)
    with serve(reply) as served, engine(served, patience) as opened:
        with pytest.raises(EngineError, match=r"5 requests in a row.*out of memory"):
            opened.generate(asks(500))
    assert len(served.calls) < 300


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, {"error": {"message": "no model m"}}, "Check the model's name"),
        (429, {"error": {"message": "x", "code": "insufficient_quota"}}, "nothing left"),
    ],
)
def test_what_fails_for_all_ends_the_run_at_once(
    status: int, body: dict[str, Any], said: str
) -> None:
    def reply(_: Call) -> Given:
        return status, body, {}

    with serve(reply) as served, engine(served) as opened:
        with pytest.raises(EngineError, match=said):
            opened.generate(asks(300))
    assert len(served.calls) < 80


def test_the_key_goes_to_its_host_only_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "sk-of-another-service")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Proxy: sk-of-another-service")
    with serve(key="sk-secret") as served:
        name = f"openai:m@{served.url}"
        with pytest.raises(ModelError, match=r"MISSTEP_KEY_127_0_0_1, which is not set"):
            locate(name)
        with engine(served) as opened, pytest.raises(EngineError) as refused:
            opened.generate(asks(1))
        assert "sk-" not in str(refused.value)
        assert all("another" not in str(headers) for headers in served.headers)
        monkeypatch.setenv("MISSTEP_KEY_127_0_0_1", "sk-secret")
        chosen = choose("auto", locate(name))
        assert chosen.at_once == MANY, "a call's last answers leave the endpoint idle"
        with CachedEngine(chosen, tmp_path / "cache.sqlite") as cached:
            assert texts(cached.generate(asks(1))) == ["question 0"]
    assert all("another" not in str(headers) for headers in served.headers)
    assert "sk-" not in chosen.identity + chosen.why
    assert b"sk-secret" not in (tmp_path / "cache.sqlite").read_bytes()


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-schlüssel"])
def test_a_key_that_no_header_can_carry_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MISSTEP_KEY_127_0_0_1", key)
    with serve() as served, pytest.raises(ModelError, match="printable ASCII") as refused:
        locate(f"openai:m@{served.url}")
    assert "sk-" not in str(refused.value)


def test_a_key_that_a_server_repeats_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISSTEP_KEY_127_0_0_1", "sk-secret")
    with serve(lambda _: (400, {"error": {"message": "bad: sk-secret"}}, {})) as served:
        with engine(served) as opened, pytest.raises(EngineError) as refused:
            opened.generate(asks(1))
    assert "[key]" in str(refused.value) and "secret" not in str(refused.value)


def test_the_identity_names_model_and_address() -> None:
    base = parse_endpoint("openai:@cf/org/m@http://host:1/v1/")
    assert base == Endpoint("@cf/org/m", "http://host:1/v1")
    others = [Endpoint("n", base.url), Endpoint(base.model, "http://host:2/v1")]
    from misstep.engines.openai import identity

    names = {identity(endpoint) for endpoint in (base, *others)}
    assert len(names) == 3 and all("host" in name for name in names)
    assert len({endpoint.digest for endpoint in (base, *others)}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "openai:m",
        "openai:@http://host/v1",
        "openai:m@host/v1",
        "openai:m@http://user:pw@host/v1",
        "openai:m@http://host/v1?key=pw",
        "openai:m@http://host:port/v1",
    ],
)
def test_names_of_another_form_are_refused_without_what_may_be_secret(name: str) -> None:
    with pytest.raises(ModelError, match=r"expected (openai:MODEL@URL|an address)") as refused:
        parse_endpoint(name)
    assert "pw" not in str(refused.value)


def test_an_address_where_nobody_listens_is_refused_before_a_run() -> None:
    with serve() as served:
        check_endpoint(Endpoint("m", served.url))
    with pytest.raises(ModelError, match="Start it, or correct the address"):
        check_endpoint(Endpoint("m", served.url))


def test_a_host_that_lists_no_models_to_this_key_may_still_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def listing(headers: Mapping[str, str]) -> int:
        return 403 if headers["User-Agent"].startswith("Python") else 200

    with serve(listing=listing) as served:
        check_endpoint(Endpoint("m", served.url))
    with serve(listing=lambda _: 403) as served:
        endpoint = Endpoint("m", served.url)
        with pytest.raises(ModelError, match=r"which is not set \(status 403\)"):
            check_endpoint(endpoint)
        monkeypatch.setenv(endpoint.variable, "a-key-that-may-chat-alone")
        check_endpoint(endpoint)


def test_an_endpoint_has_no_weights_to_load() -> None:
    with serve() as served, pytest.raises(ModelError, match="which only answers"):
        _ = locate(f"openai:m@{served.url}").files


@pytest.fixture
def slots() -> Iterator[tuple[Served, threading.Semaphore]]:
    """A server that works on six calls at once; the others queue."""
    free = threading.Semaphore(6)

    def reply(call: Call) -> Given:
        with free:
            return after(0.01, call)

    with serve(reply) as served:
        yield served, free


def test_many_are_under_way_where_the_server_bears_it(slots: tuple[Served, Any]) -> None:
    served, _ = slots
    with engine(served) as opened:
        opened.generate(asks(300))
    assert served.at_once >= 6


def test_an_answer_is_kept_before_a_slower_one_comes(tmp_path: Path) -> None:
    path, ended = tmp_path / "c.sqlite", threading.Event()

    def slow_last(call: Call) -> Given:
        if text_of(call) == "question 3":
            ended.wait(20)
            return 401, {"error": {"message": "no more"}}, {}
        return echo(call)

    def told(done: int, total: int) -> None:
        if (done, total) == (3, 4):
            ended.set()

    with serve(slow_last) as served, engine(served) as real:
        with CachedEngine(Chosen(real.identity, "", partial(same, real)), path) as cached:
            cached.notify = told
            with pytest.raises(EngineError):
                cached.generate(asks(4))
            assert ended.is_set(), "the three were waiting for the fourth"
        with serve() as other:
            again = OpenAIEngine(Endpoint("m", other.url), QUICK)
            again.identity = real.identity
            with CachedEngine(Chosen(real.identity, "", partial(same, again)), path) as cached:
                assert texts(cached.generate(asks(4))) == [f"question {i}" for i in range(4)]
                assert cached.paid == 1
