"""Policies and rules in a directory that changes."""

import os
from pathlib import Path

import pytest
import torch

from eunoe.eviction import POLICIES, Namm
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.catalogue import PolicyCatalogue
from eunoe.eviction.namm import Normalization
from eunoe.eviction.policy_files import SHIPPED, PolicyFiles
from eunoe.eviction.spectrogram import AttentionSpectrogram

SINKS_RECENT = "sinks-recent/1"


def a_namm(value: float, num_observed_queries: int | None = None) -> Namm:
    network = BackwardAttention(torch.full((NUM_PARAMETERS,), value))
    normalization = Normalization(torch.zeros(17), torch.ones(17))
    return Namm(network, normalization, AttentionSpectrogram(num_observed_queries))


def catalogue_of(directory: Path | None, default: str) -> PolicyCatalogue:
    return PolicyCatalogue(PolicyFiles(directory), default)


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


def chosen(catalogue: PolicyCatalogue, stream: str) -> tuple[str, str | None]:
    choice = catalogue.choose(stream)
    return choice.policy.name, choice.shadow.name if choice.shadow is not None else None


def test_without_a_directory_there_are_the_shipped_policies_and_those_without_parameters() -> None:
    catalogue = catalogue_of(None, "snapkv/1")

    shipped = {policy.name: policy.name for policy in map(Namm.load, SHIPPED.glob("*.safetensors"))}
    assert set(catalogue.files.by_name) == {*POLICIES, *shipped}
    assert chosen(catalogue, "tenants/a/streams/b") == ("snapkv/1", None)
    assert not catalogue.refresh()


def test_a_shipped_policy_goes_by_its_stem_until_a_file_takes_its_place(tmp_path: Path) -> None:
    (path,) = SHIPPED.glob("smollm2-namm.safetensors")
    files = PolicyFiles(tmp_path)
    shipped = files.named("smollm2-namm")

    a_namm(0.1).save(tmp_path / "smollm2-namm.safetensors")
    files.refresh()

    assert shipped.name == Namm.load(path).name
    assert files.named("smollm2-namm").name == a_namm(0.1).name
    assert files.named(shipped.name).name == shipped.name


def test_the_first_rule_that_matches_counts(tmp_path: Path) -> None:
    a_namm(0.1).save(tmp_path / "first.safetensors")
    a_namm(0.2).save(tmp_path / "second.safetensors")
    write(
        tmp_path / "rules.toml",
        """
        default = "key-norm/1"
        [[rules]]
        streams = "tenants/acme/streams/book"
        policy = "first"
        shadow = "second"
        [[rules]]
        streams = "tenants/acme/*"
        policy = "heavy-hitter/1"
        shadow = "key-norm/1"
        """,
    )

    catalogue = catalogue_of(tmp_path, SINKS_RECENT)

    assert chosen(catalogue, "tenants/acme/streams/book") == (a_namm(0.1).name, a_namm(0.2).name)
    assert chosen(catalogue, "tenants/acme/streams/books") == ("heavy-hitter/1", "key-norm/1")
    assert chosen(catalogue, "tenants/other/streams/book") == ("key-norm/1", None)
    assert chosen(catalogue, "any") == ("key-norm/1", None)
    assert catalogue.files.largest.statistics == AttentionSpectrogram()


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ("default = ", "is no TOML"),
        ('defualt = "key-norm/1"', "'defualt' is neither"),
        ('default = "best"', "no policy 'best'"),
        ('[[rules]]\nstreams = "*"\n', "a rule has"),
        ('[[rules]]\nstreams = "*"\npolicy = "key-norm/1"\nshade = "x"', "a rule has"),
        ('[[rules]]\nstreams = "*"\npolicy = "key-norm/1"\nshadow = "sinks-recent/1"', "has no scores"),
        ('[[rules]]\nstreams = "*"\npolicy = "sinks-recent/1"\nshadow = "namm"', "nobody observes"),
        ('[[rules]]\nstreams = "*"\npolicy = "few"\nshadow = "namm"', "nobody observes"),
        ('[rules]\nstreams = "*"\npolicy = "namm"', "rules.toml: rules is no list of tables"),
        ('rules = ["namm"]', "rules.toml: rules is no list of tables"),
        ('default = ["namm"]', r"rules.toml: default: \['namm'\] is no string"),
        ('[[rules]]\nstreams = "*"\npolicy = ["namm"]', r"rules.toml: rule 1: policy: \['namm'\] is no string"),
        (
            '[[rules]]\nstreams = "a"\npolicy = "namm"\n[[rules]]\nstreams = ["b", "c"]\npolicy = "namm"',
            "rules.toml: rule 2: streams: .* is no string",
        ),
        ('[[rules]]\nstreams = "*"\npolicy = "namm"\nshadow = 2026-11-26', "rules.toml: rule 1: shadow: "),
        (f"default = {'[' * 100_000}", "no TOML that can be read"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused_and_the_former_stay(
    tmp_path: Path, rules: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    a_namm(0.1).save(tmp_path / "namm.safetensors")
    a_namm(0.1, 128).save(tmp_path / "few.safetensors")
    write(tmp_path / "rules.toml", 'default = "namm"')
    catalogue = catalogue_of(tmp_path, SINKS_RECENT)
    write(tmp_path / "rules.toml", rules)

    assert not catalogue.refresh()
    assert not catalogue.refresh()

    assert len(caplog.records) == 1
    assert chosen(catalogue, "any") == (a_namm(0.1).name, None)
    with pytest.raises(ValueError, match=problem):
        catalogue_of(tmp_path, SINKS_RECENT)


def test_files_are_read_anew_when_they_change_and_policies_that_were_here_can_be_named(tmp_path: Path) -> None:
    a_namm(0.1).save(tmp_path / "namm.safetensors")
    catalogue = catalogue_of(tmp_path, "namm")
    assert not catalogue.refresh()

    a_namm(0.2).save(tmp_path / "namm.safetensors")

    assert catalogue.refresh()
    assert chosen(catalogue, "any") == (a_namm(0.2).name, None)
    assert catalogue.files.by_name[a_namm(0.1).name].name == a_namm(0.1).name


def test_while_the_directory_is_away_everything_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "policies"
    directory.mkdir()
    a_namm(0.1).save(directory / "namm.safetensors")
    write(directory / "rules.toml", '[[rules]]\nstreams = "any"\npolicy = "namm"')
    catalogue = catalogue_of(directory, SINKS_RECENT)

    directory.rename(tmp_path / "elsewhere")
    has_changed = [catalogue.refresh() for _ in range(3)]

    assert has_changed == [False] * 3
    assert chosen(catalogue, "any") == (a_namm(0.1).name, None)
    assert catalogue.files.named("namm").name == a_namm(0.1).name
    assert caplog.messages == ["policies stay as they are: the directory cannot be read"]
    (tmp_path / "elsewhere").rename(directory)
    write(directory / "rules.toml", 'default = "key-norm/1"')
    assert catalogue.refresh()
    assert chosen(catalogue, "any") == ("key-norm/1", None)


def test_a_directory_that_is_not_there_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policies cannot be read: .*missing"):
        PolicyFiles(tmp_path / "missing")


def test_a_link_to_nothing_is_a_broken_file_and_hides_no_other(tmp_path: Path) -> None:
    files = PolicyFiles(tmp_path)

    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    a_namm(0.1).save(tmp_path / "namm.safetensors")

    assert files.refresh()
    assert list(files.broken) == ["gone.safetensors"]
    assert files.named("namm").name == a_namm(0.1).name


@pytest.mark.parametrize("has_link", [True, False])
def test_rules_that_a_link_no_longer_leads_to_stay_and_removed_ones_go(tmp_path: Path, has_link: bool) -> None:
    directory = tmp_path / "policies"
    directory.mkdir()
    target = tmp_path / "target.toml" if has_link else directory / "rules.toml"
    write(target, 'default = "key-norm/1"')
    if has_link:
        (directory / "rules.toml").symlink_to(target)
    catalogue = catalogue_of(directory, SINKS_RECENT)

    target.unlink()

    assert catalogue.refresh() == (not has_link)
    assert chosen(catalogue, "any") == ("key-norm/1" if has_link else SINKS_RECENT, None)


def test_a_broken_file_changes_nothing_until_it_is_mended(tmp_path: Path) -> None:
    a_namm(0.1).save(tmp_path / "namm.safetensors")
    catalogue = catalogue_of(tmp_path, "namm")
    whole = (tmp_path / "namm.safetensors").read_bytes()

    (tmp_path / "namm.safetensors").write_bytes(whole[:-5])
    has_changed = catalogue.refresh()
    a_namm(0.3).save(tmp_path / "namm.safetensors")

    assert not has_changed
    assert catalogue.refresh()
    assert chosen(catalogue, "any") == (a_namm(0.3).name, None)


def test_rules_that_were_broken_are_read_again_though_the_file_looks_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue, path = catalogue_of(tmp_path, SINKS_RECENT), tmp_path / "rules.toml"
    write(path, 'default = "key-norm/9"')
    has_changed = [catalogue.refresh(), catalogue.refresh()]
    before = path.stat()

    path.write_text('default = "key-norm/1"')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert not any(has_changed)
    assert len(caplog.records) == 1
    assert catalogue.refresh()
    assert chosen(catalogue, "any") == ("key-norm/1", None)


def test_a_file_that_may_be_read_again_is_read_though_it_looks_the_same(tmp_path: Path) -> None:
    path = tmp_path / "namm.safetensors"
    a_namm(0.1).save(path)
    catalogue, whole = catalogue_of(tmp_path, SINKS_RECENT), path.read_bytes()
    path.write_bytes(b"x" * len(whole))
    before = path.stat()
    has_changed = [catalogue.refresh(), catalogue.refresh()]

    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert not any(has_changed)
    assert catalogue.refresh()
    assert catalogue.files.named("namm").name == a_namm(0.1).name


def test_without_rules_a_broken_file_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_namm(0.1).save(tmp_path / "namm.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    write(tmp_path / "rules.toml", "no rules")

    files = PolicyFiles(tmp_path)

    assert files.named("namm").name == a_namm(0.1).name
    assert list(files.broken) == ["broken.safetensors"]
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="no policy 'broken'"):
        files.named("broken")
