from tests import counts, mutants


def test_every_mutant_has_its_place_once_and_changes_it():
    for mutant in mutants.read():
        assert mutants.mutated(mutant) != (counts.ROOT / mutant.file).read_text(), mutant
        compile(mutants.mutated(mutant), mutant.file, "exec")
        for test in mutants.TESTS[mutant.file]:
            assert mutants.file_of(test)


def test_there_are_a_hundred_and_each_is_named_once():
    named = set(map(str, mutants.read()))
    assert len(named) == len(mutants.read()) >= 100
    assert set(mutants.HARMLESS) <= named
