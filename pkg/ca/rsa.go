package ca

import (
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"sync"
)

const (
	minRSABits   = 2048
	maxRSABits   = 4096
	rsaExponent  = 65537
	fermatRounds = 100
)

// checkRSASize is the cheap part of the policy for RSA keys.
func checkRSASize(pub *rsa.PublicKey) error {
	if bits := pub.N.BitLen(); bits < minRSABits || bits > maxRSABits {
		return fmt.Errorf("rsa key of %d bits: %d to %d are allowed", bits, minRSABits, maxRSABits)
	}
	if pub.E != rsaExponent {
		return fmt.Errorf("rsa key with the public exponent %d: %d is required", pub.E, rsaExponent)
	}
	if pub.N.Bit(0) == 0 {
		return errors.New("rsa key with an even modulus")
	}
	return nil
}

// checkRSAModulus refuses moduli that can be factored with little work.
func checkRSAModulus(n *big.Int) error {
	product, primes := smallPrimes()
	if new(big.Int).GCD(nil, nil, n, product).Cmp(big.NewInt(1)) != 0 {
		return errors.New("rsa key whose modulus has a small prime factor")
	}
	if isROCA(n, primes) {
		return errors.New("rsa key made by a defective library (roca, CVE-2017-15361): make a new key elsewhere")
	}
	if isFermatFactorable(n) {
		return errors.New("rsa key whose primes are too close to each other")
	}
	return nil
}

// smallPrimes are the odd primes below 752, with their product.
var smallPrimes = sync.OnceValues(func() (product *big.Int, primes []uint64) {
	product = big.NewInt(1)
	for n := uint64(3); n < 752; n += 2 {
		if big.NewInt(int64(n)).ProbablyPrime(0) {
			primes = append(primes, n)
			product.Mul(product, new(big.Int).SetUint64(n))
		}
	}
	return product, primes
})

// isROCA reports whether n has the fingerprint of CVE-2017-15361: all primes of
// the defective generator, and so their products, are powers of 65537 modulo
// each of the first primes. A good modulus has it with probability 2^-154.
func isROCA(n *big.Int, primes []uint64) bool {
	for _, p := range primes {
		if p > 701 {
			break
		}
		want := new(big.Int).Mod(n, new(big.Int).SetUint64(p)).Uint64()
		found, power := false, uint64(1)
		for range p - 1 {
			if power == want {
				found = true
				break
			}
			power = power * (rsaExponent % p) % p
		}
		if !found {
			return false
		}
	}
	return true
}

// isFermatFactorable tries Fermat's method for some rounds: primes that differ
// in their lower half only are found in the first ones.
func isFermatFactorable(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	if new(big.Int).Mul(a, a).Cmp(n) == 0 {
		return true
	}
	one := big.NewInt(1)
	a.Add(a, one)
	square := new(big.Int).Mul(a, a)
	square.Sub(square, n)
	root := new(big.Int)
	for range fermatRounds {
		root.Sqrt(square)
		if root.Mul(root, root).Cmp(square) == 0 {
			return true
		}
		// (a+1)² - n = a² - n + 2a + 1
		square.Add(square, a).Add(square, a).Add(square, one)
		a.Add(a, one)
	}
	return false
}
