from lightning_distill.data.tally import Tally


def test_counts_keep_the_first_example() -> None:
    tally = Tally()
    assert not tally
    tally.add("images without a caption", "a.png")
    tally.add("images without a caption", "b.png", count=2)
    total = Tally()
    for place in ("x.tar", "y.tar"):
        total.update(tally, place)
    total.update(Tally({"cut files": (1, "")}), "z.tar")
    assert str(total) == "images without a caption: 6 (first a.png in x.tar); cut files: 1 (first z.tar)"
    assert str(Tally.from_json(total.to_json())) == str(total)
