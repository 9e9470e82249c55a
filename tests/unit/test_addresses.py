"""Two spellings of one address are one address; what is no address of one machine is refused with a reason."""

from __future__ import annotations

import pytest

from portal.services.addresses import normalise


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("192.0.2.7", "192.0.2.7"),
        (" 192.0.2.7 ", "192.0.2.7"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:0db8:0000:0000:0000:0000:0000:0001", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("GPU-1.Example.ORG", "gpu-1.example.org"),
        ("gpu-1.example.org.", "gpu-1.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example.", "xn--bcher-kva.example"),
        ("gpu1", "gpu1"),
        ("机器.example", "xn--m7r540b.example"),
    ],
)
def test_an_address_has_one_spelling(given: str, canonical: str) -> None:
    assert normalise(given) == canonical
    assert normalise(canonical) == canonical


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("", "neither an IP address nor a host name"),
        ("   ", "neither an IP address nor a host name"),
        ("gpu 1", "neither"),
        ("gpu_1.example.org", "neither"),
        ("-gpu.example.org", "neither"),
        ("gpu-.example.org", "neither"),
        ("a..b", "neither"),
        ("a" * 64 + ".example.org", "neither"),
        ("a." * 130 + "org", "neither"),
        ("{{ lookup('pipe', 'id') }}", "neither"),
        ("$(id)", "neither"),
        ("-oProxyCommand=id", "neither"),
        ("gpu;id", "neither"),
        ("gpu\nProxyCommand id", "neither"),
        ("http://gpu-1/", "port goes into its own field"),
        ("192.0.2.7:22", "port goes into its own field"),
        ("[2001:db8::1]:22", "port goes into its own field"),
        ("fe80::1%eth0", "names an interface"),
        ("0.0.0.0", "not the address of one machine"),
        ("::", "not the address of one machine"),
        ("224.0.0.1", "not the address of one machine"),
        ("ff02::1", "not the address of one machine"),
        ("255.255.255.255", "not the address of one machine"),
        ("127.1", "not written out"),
        ("2130706433", "not written out"),
        ("0x7f.0.0.1", "not written out"),
        ("0x7f000001", "not written out"),
        ("192.0.2.007", "not written out"),
        ("gpu.1", "not written out"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(given: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        normalise(given)
