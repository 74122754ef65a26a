package ca

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// SPIFFE-ID §2.3: 255 bytes for the trust domain, 2048 for the whole.
	maxTrustDomain = 255
	maxID          = 2048
	// ownPath is that of the CA's own X.509-SVID; nobody else can get it.
	ownPath = "/meshid/ca"

	maxDNSNames = 64
	maxDNSName  = 253
)

// checkTrustDomain is stricter than SPIFFE-ID §2.1: crypto/x509 does not parse
// URIs whose host has empty labels.
func checkTrustDomain(name string) error {
	if name == "" {
		return errors.New("a trust domain is required, such as example.org")
	}
	if len(name) > maxTrustDomain {
		return fmt.Errorf("trust domain of %d bytes: at most %d are allowed", len(name), maxTrustDomain)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("trust domain %q: each of its labels must begin and end with a letter or digit", name)
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return fmt.Errorf("trust domain %q: only lower-case letters, digits, hyphens, underscores and dots are allowed", name)
			}
		}
	}
	return nil
}

// checkID returns the ID's text if it may be in a leaf of this trust domain.
func checkID(td spiffeid.TrustDomain, id spiffeid.ID) (string, error) {
	text := id.String()
	switch {
	case id.IsZero():
		return "", errors.New("there is none")
	case id.TrustDomain() != td:
		return "", fmt.Errorf("it is of trust domain %q, this authority signs for %q", id.TrustDomain().Name(), td.Name())
	case id.Path() == "":
		return "", errors.New("it has no path: x509-svid §3.1 reserves it for authorities")
	case len(text) > maxID:
		return "", fmt.Errorf("it has %d bytes: at most %d are allowed", len(text), maxID)
	}
	for segment := range strings.SplitSeq(id.Path()[1:], "/") {
		if strings.Trim(segment, ".") == "" {
			return "", fmt.Errorf("segment %q of its path is empty or only dots", segment)
		}
	}
	return text, nil
}

// checkDNSNames refuses what RFC 1123 §2.1 and RFC 6125 §6.4.3 do not allow.
func checkDNSNames(names []string) error {
	if len(names) > maxDNSNames {
		return fmt.Errorf("%d names: at most %d are allowed", len(names), maxDNSNames)
	}
	for i, name := range names {
		if err := checkDNSName(name); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		if slices.Contains(names[:i], name) {
			return fmt.Errorf("%q is there twice", name)
		}
	}
	return nil
}

func checkDNSName(name string) error {
	if name == "" || len(name) > maxDNSName {
		return fmt.Errorf("it must have 1 to %d bytes", maxDNSName)
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return errors.New("it is an IP address")
	}
	for label := range strings.SplitSeq(strings.TrimPrefix(name, "*."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return errors.New("each label must have 1 to 63 bytes and begin and end with a letter or digit")
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return errors.New("only lower-case letters, digits, hyphens and underscores are allowed between its dots")
			}
		}
	}
	return nil
}
