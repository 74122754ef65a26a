package identity

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of names.
const (
	// maxID is the length of a SPIFFE ID in bytes, its scheme included.
	// SPIFFE-ID §2.3: implementations must support 2048 bytes and should not
	// generate more.
	maxID = 2048
	// maxTrustDomain is the length of a trust domain's name in bytes.
	// SPIFFE-ID §2.3, RFC 3986 §3.2.2: at most 255.
	maxTrustDomain = 255
	// maxDNSName and maxDNSLabel: RFC 1035 §2.3.4, without the root label.
	maxDNSName  = 253
	maxDNSLabel = 63
)

const scheme = "spiffe://"

// ReservedPath is the path below which the system's own identities lie, those of
// nodes and of the CA. No registration entry may produce a SPIFFE ID below it.
const ReservedPath = "/meshid/"

// ParseID parses a SPIFFE ID. It is stricter than go-spiffe: it also refuses
// what is too long (SPIFFE-ID §2.3), trust domains that no certificate can
// carry, and path segments that are dots only. What it accepts is never changed:
// the ID's String is s, byte for byte, so comparing IDs is comparing bytes. An ID
// without a path, which names a trust domain, is accepted.
func ParseID(s string) (spiffeid.ID, error) {
	if err := checkID(s); err != nil {
		return spiffeid.ID{}, fmt.Errorf("parse SPIFFE ID %s: %w", quoteShort(s), err)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("parse SPIFFE ID %s: %w", quoteShort(s), err)
	}
	return id, nil
}

func checkID(s string) error {
	if len(s) > maxID {
		return fmt.Errorf("it has %d bytes, at most %d are allowed", len(s), maxID)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return errors.New(`it must begin with "spiffe://" in lower case`)
	}
	td, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		td, path = rest[:i], rest[i:]
	}
	if err := checkTrustDomain(td); err != nil {
		return err
	}
	for path != "" {
		segment := path[1:]
		if i := strings.IndexByte(segment, '/'); i >= 0 {
			segment = segment[:i]
		}
		if err := checkSegment(segment); err != nil {
			if segment == "" && len(path) == 1 {
				return errors.New("its path ends with a slash")
			}
			return err
		}
		path = path[1+len(segment):]
	}
	return nil
}

// ParseTrustDomain parses the name of a trust domain, such as "example.org":
// 1 to 255 bytes of a-z, 0-9, dots, hyphens and underscores, whose labels are not
// empty and do not begin or end with a hyphen, because a certificate could not
// carry it or a verifier would not take it.
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	if name, ok := strings.CutPrefix(s, scheme); ok {
		return spiffeid.TrustDomain{}, fmt.Errorf("parse trust domain %s: it is written without %q, as %s", quoteShort(s), scheme, quoteShort(name))
	}
	if err := checkTrustDomain(s); err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("parse trust domain %s: %w", quoteShort(s), err)
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("parse trust domain %s: %w", quoteShort(s), err)
	}
	return td, nil
}

func checkTrustDomain(s string) error {
	switch {
	case s == "":
		return errors.New("the trust domain is empty")
	case len(s) > maxTrustDomain:
		return fmt.Errorf("the trust domain has %d bytes, at most %d are allowed", len(s), maxTrustDomain)
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			if c := s[i]; !isLower(c) && !isDigit(c) && c != '-' && c != '_' {
				return fmt.Errorf("the trust domain has %s, only a-z, 0-9, '.', '-' and '_' are allowed", quoteByte(s, i))
			}
			continue
		}
		switch label := s[start:i]; {
		case label == "":
			return errors.New("the trust domain has an empty label (a dot too many)")
		case label[0] == '-' || label[len(label)-1] == '-':
			return fmt.Errorf("the trust domain's label %q begins or ends with a hyphen", label)
		}
		start = i + 1
	}
	return nil
}

// checkSegment checks one segment of a path (SPIFFE-ID §2.2). Segments of dots
// only are refused beyond "." and "..": some path cleaners eat them too.
func checkSegment(s string) error {
	if s == "" {
		return errors.New("a path segment is empty")
	}
	dots := true
	for i := range len(s) {
		c := s[i]
		if !isLower(c) && !isUpper(c) && !isDigit(c) && c != '-' && c != '.' && c != '_' {
			return fmt.Errorf("a path segment has %s, only a-z, A-Z, 0-9, '.', '-' and '_' are allowed", quoteByte(s, i))
		}
		dots = dots && c == '.'
	}
	if dots {
		return fmt.Errorf("the path segment %q is dots only", s)
	}
	return nil
}

// NodeID returns the SPIFFE ID of a node, spiffe://td/meshid/node/<method>/<id>.
// Both must be legal path segments: nothing is escaped.
func NodeID(td spiffeid.TrustDomain, method, id string) (spiffeid.ID, error) {
	if err := checkSegment(method); err != nil {
		return spiffeid.ID{}, fmt.Errorf("name node: method %s: %w", quoteShort(method), err)
	}
	if err := checkSegment(id); err != nil {
		return spiffeid.ID{}, fmt.Errorf("name node: id %s: %w", quoteShort(id), err)
	}
	return ParseID(scheme + td.Name() + ReservedPath + "node/" + method + "/" + id)
}

// CAID returns the SPIFFE ID of a trust domain's CA, spiffe://td/meshid/ca: the
// zero ID for the zero trust domain.
func CAID(td spiffeid.TrustDomain) spiffeid.ID {
	id, err := spiffeid.FromPath(td, ReservedPath+"ca")
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// Reserved reports whether a SPIFFE ID's path is the system's own.
func Reserved(path string) bool {
	return path+"/" == ReservedPath || strings.HasPrefix(path, ReservedPath)
}

// ValidateDNSName checks a name for the DNS SAN of an X.509-SVID: lower-case
// letters, digits and inner hyphens in labels of 1 to 63 bytes, 253 bytes at
// most, no trailing dot, no wildcard, nothing that reads as an IP address.
func ValidateDNSName(s string) error {
	if err := checkLabels(s); err != nil {
		return fmt.Errorf("DNS name %s: %w", quoteShort(s), err)
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	if strings.Trim(last, "0123456789") == "" {
		// RFC 3696 §2: a top-level domain is never all digits.
		return fmt.Errorf("DNS name %s: its last label is a number, as in an IP address", quoteShort(s))
	}
	return nil
}

// checkLabels checks one or more DNS labels (RFC 1123 §2.1, lower case only).
func checkLabels(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	if len(s) > maxDNSName {
		return fmt.Errorf("it has %d bytes, at most %d are allowed", len(s), maxDNSName)
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			if c := s[i]; !isLower(c) && !isDigit(c) && c != '-' {
				return fmt.Errorf("it has %s, only a-z, 0-9, '-' and dots between labels are allowed", quoteByte(s, i))
			}
			continue
		}
		switch label := s[start:i]; {
		case label == "":
			return errors.New("it has an empty label (a dot too many)")
		case len(label) > maxDNSLabel:
			return fmt.Errorf("a label has %d bytes, at most %d are allowed", len(label), maxDNSLabel)
		case label[0] == '-' || label[len(label)-1] == '-':
			return fmt.Errorf("the label %q begins or ends with a hyphen", label)
		}
		start = i + 1
	}
	return nil
}

func isLower(c byte) bool { return 'a' <= c && c <= 'z' }
func isUpper(c byte) bool { return 'A' <= c && c <= 'Z' }
func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// quoteByte names the character of s that the byte at i belongs to.
func quoteByte(s string, i int) string {
	r, size := utf8.DecodeRuneInString(s[i:])
	if r == utf8.RuneError && size <= 1 {
		return fmt.Sprintf("the byte %#02x", s[i])
	}
	return fmt.Sprintf("%q", r)
}

// maxQuoted is how much of a value an error or an explanation repeats, in bytes.
const maxQuoted = 64

// quoteShort quotes a value of unknown origin for a message.
func quoteShort(s string) string {
	if len(s) <= maxQuoted {
		return fmt.Sprintf("%q", s)
	}
	cut := maxQuoted
	for cut > maxQuoted-4 && s[cut]&0xC0 == 0x80 { // not inside a character
		cut--
	}
	return fmt.Sprintf("%q… (%d bytes)", s[:cut], len(s))
}
