//go:build !pkcs11 || !cgo

package keys

// openPKCS11 is in programs that are built with cgo and the tag pkcs11.
var openPKCS11 func(target) (session, error)
