from misstep.engines.base import Request
from misstep.engines.scripted import ScriptedEngine, echo
from misstep.records import Message


def ask(text: str, max_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> Request:
    return Request(
        messages=(Message(role="user", content=text),),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )


def test_answers_come_in_order_and_requests_are_kept() -> None:
    requests = [ask(text) for text in "abc"]
    engine = ScriptedEngine(lambda r: r.messages[-1].content.upper())
    assert [a.text for a in engine.generate(requests)] == ["A", "B", "C"]
    assert engine.requests == requests
    assert engine.generate([]) == []


def test_the_token_limit_breaks_answers_off() -> None:
    whole, broken = ScriptedEngine().generate([ask("a b c", 3), ask("a b c", 2)])
    assert (whole.text, whole.tokens, whole.truncated) == ("a b c", 3, False)
    assert (broken.text, broken.tokens, broken.truncated) == ("a b", 2, True)


def test_the_seed_matters_with_a_temperature_only() -> None:
    assert len({echo(ask("x", seed=seed)) for seed in (1, 2)}) == 1
    assert len({echo(ask("x", temperature=1, seed=seed)) for seed in (1, 2)}) == 2


def test_identity_follows_the_name() -> None:
    assert ScriptedEngine(name="a").identity == ScriptedEngine(name="a").identity
    assert ScriptedEngine(name="a").identity != ScriptedEngine(name="b").identity


def test_an_engine_closes_at_the_end_of_its_block() -> None:
    class Closing(ScriptedEngine):
        closed = False

        def close(self) -> None:
            self.closed = True

    with Closing() as engine:
        assert not engine.closed
    assert engine.closed
