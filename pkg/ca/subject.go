package ca

import (
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Subject is what the names of our roots and intermediates have in common. Each has a
// serialNumber of its own besides, so that path building by name alone finds the right
// one.
type Subject struct {
	// CommonName is what stands before " root" and " intermediate"; "meshid" if "".
	CommonName string
	// Organization is the trust domain's name, if that is short enough, if "".
	Organization string
	// The rest is left out where it is "". Country is a code of two letters.
	OrganizationalUnit, Country, Province, Locality string
}

// RFC 5280 appendix A.1, ub-common-name and those after it: in characters.
const (
	maxCommonName   = 64 - len(" intermediate")
	maxOrganization = 64
	maxProvince     = 128
)

// Check says what cannot be in a certificate, by the field as a configuration names it.
func (s Subject) Check() (field string, err error) {
	for _, f := range []struct {
		name, value string
		most        int
	}{
		{"common_name", s.CommonName, maxCommonName},
		{"organization", s.Organization, maxOrganization},
		{"organizational_unit", s.OrganizationalUnit, maxOrganization},
		{"province", s.Province, maxProvince},
		{"locality", s.Locality, maxProvince},
	} {
		if err := checkAttribute(f.value, f.most); err != nil {
			return f.name, err
		}
	}
	if c := s.Country; c != "" && (len(c) != 2 || c[0] < 'A' || c[0] > 'Z' || c[1] < 'A' || c[1] > 'Z') {
		return "country", fmt.Errorf("%.20q is not a country; write its code of two capital letters, such as DE (ISO 3166)", c)
	}
	return "", nil
}

func checkAttribute(value string, most int) error {
	if n := utf8.RuneCountInString(value); n > most {
		return fmt.Errorf("it has %d characters: at most %d are allowed (RFC 5280)", n, most)
	}
	if !utf8.ValidString(value) {
		return errors.New("it is not UTF-8")
	}
	for _, r := range value {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("%q is in it, which cannot be printed", r)
		}
	}
	return nil
}

// name is that of a root or an intermediate, whose role it is.
func (s Subject) name(td spiffeid.TrustDomain, role string) pkix.Name {
	n := pkix.Name{CommonName: s.CommonName + " " + role}
	if s.CommonName == "" {
		n.CommonName = "meshid " + role
	}
	organization := s.Organization
	if organization == "" && len(td.Name()) <= maxOrganization {
		organization = td.Name()
	}
	for _, part := range []struct {
		to    *[]string
		value string
	}{
		{&n.Organization, organization},
		{&n.OrganizationalUnit, s.OrganizationalUnit},
		{&n.Country, s.Country},
		{&n.Province, s.Province},
		{&n.Locality, s.Locality},
	} {
		if part.value != "" {
			*part.to = []string{part.value}
		}
	}
	return n
}

// Root is the name of a root, without what it has of its own.
func (s Subject) Root(td spiffeid.TrustDomain) pkix.Name { return s.name(td, RoleRoot) }
