//go:build !yubikey || !cgo

package keys

// openYubiKey is in programs that are built with cgo and the tag yubikey.
var openYubiKey func(target) (session, error)
