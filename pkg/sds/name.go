package sds

import (
	"strings"

	"github.com/meshid/meshid/pkg/identity"
)

// kind is what may stand under a name. It is decided by the name alone.
type kind uint8

const (
	kindUnknown kind = iota
	kindRoot         // a validation context
	kindLeaf         // a certificate with its key
)

// The names that are not SPIFFE IDs. Secrets have these names in the proxies'
// metrics, which is why they are short and have no dots.
const (
	nameDefault = "default"
	nameRoot    = "ROOTCA"
	nameAll     = "ALL"
)

const scheme = "spiffe://"

// kindOf returns the kind of a resource name.
func kindOf(name string) kind {
	switch name {
	case nameDefault:
		return kindLeaf
	case nameRoot, nameAll:
		return kindRoot
	}
	if !strings.HasPrefix(name, scheme) {
		return kindUnknown
	}
	id, err := identity.ParseID(name)
	switch {
	case err != nil:
		return kindUnknown
	case id.Path() == "":
		return kindRoot
	default:
		return kindLeaf
	}
}
