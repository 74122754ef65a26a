package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"slices"
	"strings"
	"testing"
)

// Row B4: keys that are refused, each with its reason.
func TestV_B4_KeyPolicy(t *testing.T) {
	modulus := rsaKey().N
	for name, tc := range map[string]struct {
		pub  any
		want string
	}{
		"rsa 1024":     {&rsa.PublicKey{N: new(big.Int).Rsh(modulus, 1024), E: 65537}, "1024 bits"},
		"rsa 512":      {&rsa.PublicKey{N: new(big.Int).Rsh(modulus, 1536), E: 65537}, "512 bits"},
		"rsa 8192":     {&rsa.PublicKey{N: new(big.Int).Lsh(modulus, 6144), E: 65537}, "8192 bits"},
		"rsa e=3":      {&rsa.PublicKey{N: modulus, E: 3}, "exponent 3"},
		"rsa e=1":      {&rsa.PublicKey{N: modulus, E: 1}, "exponent 1"},
		"rsa e even":   {&rsa.PublicKey{N: modulus, E: 65536}, "exponent 65536"},
		"even modulus": {&rsa.PublicKey{N: new(big.Int).Add(modulus, big.NewInt(1)), E: 65537}, "even"},
	} {
		t.Run(name, func(t *testing.T) {
			spki, err := x509.MarshalPKIXPublicKey(tc.pub)
			if err != nil {
				t.Fatal(err)
			}
			_, err = ParseCSR(withSPKI(t, spki))
			_, proven := ProvenKey(spki)
			for _, err := range []error{err, proven} {
				wantReason(t, err, ReasonCSR)
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got %v, want %q", err, tc.want)
				}
			}
		})
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-224": p224, "P-521": p521} {
		_, err := ParseCSR(csr(t, key))
		if wantReason(t, err, ReasonCSR); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Row B4: points that are none.
func TestV_B4_Points(t *testing.T) {
	good := append([]byte{4}, point(t, newKey(t))[1:]...)
	off := bytes.Clone(good)
	off[64] ^= 1
	for name, p := range map[string][]byte{
		"off the curve": off,
		"identity":      {0},
		"compressed":    append([]byte{2}, good[1:33]...),
		"hybrid":        append([]byte{6}, good[1:]...),
		"zero":          append([]byte{4}, make([]byte, 64)...),
		"short":         good[:64],
		"long":          append(bytes.Clone(good), 0),
		"beyond p":      append([]byte{4}, bytes.Repeat([]byte{0xff}, 64)...),
	} {
		spki := appendValue(nil, tagSequence, append(bytes.Clone(p256Prefix[2:23]), appendValue(nil, tagBitString, append([]byte{0}, p...))...))
		if _, err := ParseCSR(withSPKI(t, spki)); err == nil {
			t.Errorf("%s accepted", name)
		} else {
			wantReason(t, err, ReasonCSR)
		}
		_, err := ProvenKey(spki)
		wantReason(t, err, ReasonCSR)
	}
}

// withSPKI is a request for a key whose private half nobody has.
func withSPKI(t testing.TB, spki []byte) []byte {
	t.Helper()
	info := slices.Concat([]byte{0x02, 0x01, 0x00, 0x30, 0x00}, spki, []byte{0xa0, 0x00})
	algorithm := []byte{0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00}
	if bytes.Contains(spki, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01}) {
		algorithm = derSignatureAlgorithm
	}
	return appendValue(nil, tagSequence, slices.Concat(
		appendValue(nil, tagSequence, info), algorithm, appendValue(nil, tagBitString, make([]byte, 71))))
}

func TestV_B4_WeakModuli(t *testing.T) {
	if err := checkRSAModulus(rsaKey().N); err != nil {
		t.Error(err)
	}
	random := make([]byte, 128)
	_, _ = rand.Read(random) // never fails
	random[0] |= 0x80
	p := primeFrom(new(big.Int).SetBytes(random)) // crypto/rand.Prime is not for FIPS 140
	close := primeFrom(new(big.Int).Add(p, big.NewInt(1)))
	// A product of powers of 65537 modulo each small prime, as the defective
	// library's are, without its structure.
	product, primes := smallPrimes()
	roca := new(big.Int).Exp(big.NewInt(65537), big.NewInt(12345), product)
	for _, tc := range []struct {
		n    *big.Int
		want string
	}{
		{new(big.Int).Mul(p, close), "close"},
		{new(big.Int).Mul(p, p), "close"},
		{new(big.Int).Mul(p, big.NewInt(751)), "small prime"},
		{new(big.Int).Add(roca, new(big.Int).Mul(product, big.NewInt(1<<40))), "CVE-2017-15361"},
	} {
		if err := checkRSAModulus(tc.n); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got %v, want %q", err, tc.want)
		}
	}
	if len(primes) != 132 || primes[0] != 3 || primes[131] != 751 {
		t.Errorf("%d primes", len(primes))
	}
}

// primeFrom returns the first prime that is n or more.
func primeFrom(n *big.Int) *big.Int {
	p := new(big.Int).SetBit(n, 0, 1)
	for !p.ProbablyPrime(10) {
		p.Add(p, big.NewInt(2))
	}
	return p
}
