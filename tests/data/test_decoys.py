"""What stands beside an answer that a judge is trained or measured on."""

from misstep.data.decoys import LEARNED, MEASURED, PLACES, beside, with_decoys
from misstep.data.labelled import Case, DataSet
from misstep.records import Prompt, Response

CASES = [
    Case(
        f"line {i}", Response(prompt=Prompt.of(f"Q{i}?"), text=f"<answer {i}>"), i % 2 == 0, ()
    )
    for i in range(200)
]
DATA = DataSet("set", "0123", CASES, {"no answer": 3}, False)


def test_an_answer_stays_whole_and_keeps_its_label() -> None:
    found = with_decoys(CASES, LEARNED, seed=1)
    for before, after in zip(CASES, found, strict=True):
        assert before.response.text in after.response.text != before.response.text
        assert after.response.prompt == before.response.prompt
        assert (after.label, after.where) == (before.label, before.where)
    assert found == with_decoys(CASES, LEARNED, seed=1)
    assert found != with_decoys(CASES, LEARNED, seed=2)


def test_only_harmless_text_is_put_beside() -> None:
    bad = {case.response.text for case in CASES if case.label}
    for before, after in zip(CASES, with_decoys(CASES, MEASURED, 0), strict=True):
        added = after.response.text.replace(before.response.text, "", 1)
        assert not any(text in added for text in bad)


def test_a_judge_is_not_measured_with_the_words_that_it_was_trained_with() -> None:
    def all_of(words: tuple[tuple[str, ...], tuple[str, ...], str]) -> set[str]:
        return {*words[0], *words[1], words[2]}

    assert not all_of(LEARNED) & all_of(MEASURED)
    found = "\n".join(case.response.text for case in beside(DATA).cases)
    assert not any(words in found for words in (*LEARNED.refusals, *LEARNED.claims, "User: "))
    assert all(
        words in found for words in (*MEASURED.refusals, *MEASURED.claims, "Question: Q")
    )


def test_the_set_is_told_from_the_one_that_people_labelled() -> None:
    found = beside(DATA)
    assert (found.name, found.decoys, DATA.decoys) == ("set with decoys", True, False)
    assert found.digest != DATA.digest
    assert found.left_out == DATA.left_out


def test_without_harmless_answers_refusals_and_claims_remain() -> None:
    bad = [case._replace(label=True) for case in CASES]
    found = with_decoys(bad, LEARNED, 0)
    assert all("User: " not in case.response.text for case in found)
    assert len(PLACES) == 4
    said = (*LEARNED.refusals, *LEARNED.claims)
    assert all(any(words in case.response.text for words in said) for case in found)
