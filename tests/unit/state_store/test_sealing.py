import pytest
from hypothesis import given
from hypothesis import strategies as st

from eunoe.runtime.errors import CorruptState, KeyUnavailable
from eunoe.state_store.sealing import CipherSeal, DigestSeal, Keyring, Seal

SEALS: list[Seal] = [DigestSeal(), CipherSeal(bytes(32))]


@pytest.mark.parametrize("seal", SEALS)
@given(data=st.binary(max_size=200), identity=st.text(max_size=20))
def test_a_value_opens_as_it_was_closed(seal: Seal, data: bytes, identity: str) -> None:
    sealed = seal.close(identity, data)

    assert seal.open(identity, sealed) == data
    assert len(sealed) == len(data) + seal.overhead_bytes


@pytest.mark.parametrize("seal", SEALS)
def test_every_flipped_bit_and_every_cut_is_noticed(seal: Seal) -> None:
    sealed = seal.close("a", b"some value")

    damaged = [sealed[:n] for n in range(len(sealed))] + [sealed + b"\0"]
    for place in range(len(sealed)):
        damaged += [sealed[:place] + bytes([sealed[place] ^ 1 << bit]) + sealed[place + 1 :] for bit in range(8)]
    for each in damaged:
        with pytest.raises(CorruptState):
            seal.open("a", each)


@pytest.mark.parametrize("seal", SEALS)
@given(one=st.tuples(st.text(), st.binary()), other=st.text())
def test_a_value_opens_under_no_other_identity(seal: Seal, one: tuple[str, bytes], other: str) -> None:
    identity, data = one
    if identity != other:
        with pytest.raises(CorruptState):
            seal.open(other, seal.close(identity, data))


@pytest.mark.parametrize(("seal", "form"), [(SEALS[0], 1), (SEALS[1], 2)])
def test_another_form_is_named_and_so_is_the_right_one(seal: Seal, form: int) -> None:
    with pytest.raises(CorruptState, match=f"sealed in form 7, and must be in form {form}"):
        seal.open("a", b"\x07" + seal.close("a", b"value")[1:])


def test_an_encrypted_value_shows_nothing_and_never_looks_the_same() -> None:
    seal = CipherSeal(bytes(32))

    first, second = seal.close("a", b"canary" * 50), seal.close("a", b"canary" * 50)

    assert b"canary" not in first
    assert first != second


def test_a_data_key_opens_only_with_its_master_key_and_for_its_tenant() -> None:
    keyring = Keyring(bytes(32))
    wrapped_key = keyring.new_key("t")
    sealed = keyring.seal("t", wrapped_key).close("a", b"value")

    assert Keyring(bytes(32)).seal("t", wrapped_key).open("a", sealed) == b"value"
    for other, tenant in ((Keyring(b"\1" * 32), "t"), (Keyring(), "t"), (keyring, "u")):
        with pytest.raises(KeyUnavailable):
            other.seal(tenant, wrapped_key)


def test_streams_of_one_tenant_do_not_share_keys() -> None:
    keyring = Keyring(bytes(32))
    first, second = keyring.new_key("t"), keyring.new_key("t")

    with pytest.raises(CorruptState):
        keyring.seal("t", second).open("a", keyring.seal("t", first).close("a", b"value"))


def test_without_a_master_key_values_are_digested() -> None:
    keyring = Keyring()

    assert keyring.new_key("t") == ""
    assert isinstance(keyring.seal("t", ""), DigestSeal)


def test_a_master_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Keyring(b"short")
