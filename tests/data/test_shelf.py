import random
import tracemalloc

from misstep.data.shelf import HELD, Names, Shelf
from misstep.records import Prompt, digest


def prompts(n: int, length: int = 1) -> list[Prompt]:
    return [Prompt.of(f"Frage {i} – ü\n" + "x" * length, target=str(i)) for i in range(n)]


def test_a_shelf_gives_back_what_was_put_on_it_in_memory_and_as_a_file() -> None:
    for given in (prompts(9), prompts(40, HELD // 20)):
        shelf = Shelf(Prompt, given[:5])
        assert shelf[2] == given[2]
        for prompt in given[5:]:
            shelf.add(prompt)
        assert list(shelf) == list(shelf) == given
        assert (len(shelf), shelf[-1], shelf[1:3]) == (len(given), given[-1], given[1:3])


def test_two_readers_do_not_disturb_each_other() -> None:
    shelf = Shelf(Prompt, given := prompts(9))
    assert list(zip(shelf, shelf, strict=True)) == list(zip(given, given, strict=True))


def test_a_draw_is_that_of_a_list() -> None:
    given = prompts(50)
    expected = list(given)
    random.Random("draw 3").shuffle(expected)
    assert list(Shelf(Prompt, given).draw(None, 3)) == expected
    assert list(Shelf(Prompt, given).draw(7, 3)) == expected[:7]


def test_names_come_once_and_keep_their_first_note() -> None:
    names = Names()
    many = [digest(i) for i in range(2000)]
    assert all(names.add(name, f"note {name}") for name in many)
    assert not any(names.add(name, "another") for name in many)
    assert [names.note(name) for name in many] == [f"note {name}" for name in many]
    assert names.note(digest("new")) is None
    assert all(map(Names().add, ("0" * 16, "f" * 16, "8" + "0" * 15)))


def test_a_shelf_holds_a_few_bytes_a_record() -> None:
    given = prompts(1, 2000)[0]
    tracemalloc.start()
    shelf = Shelf(Prompt, (given for _ in range(5000)))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(shelf) == 5000 and held < 200_000
