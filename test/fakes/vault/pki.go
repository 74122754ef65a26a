package vault

import (
	"crypto/x509"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// pki is a mount of the PKI secrets engine. Who signs in it is Server.authority.
type pki struct {
	maxTTL  time.Duration
	issuers []string // names of its issuer, beside "default"
	roles   map[string]*leafRole
}

// leafRole is one of the mount, which signs leaves.
type leafRole struct {
	requireCN bool
	uris, dns []string // what may be in a CSR; DNS names below these domains
	keyType   string
	keyUsage  []string
	maxTTL    time.Duration
}

// leafParameters are those of sign/:role.
var leafParameters = []string{
	"csr", "common_name", "alt_names", "ip_sans", "uri_sans", "other_sans", "ttl", "format", "exclude_cn_from_sans", "serial_number", "not_after", "remove_roots_from_chain", "user_ids", "issuer_ref",
}

// makeRole serves roles/:name. Of the parameters it knows those that the page uses.
func (s *Server) makeRole(c *call, p *pki, name string) *answer {
	if bad := s.only(c, "require_cn", "allowed_uri_sans", "allowed_domains", "allow_subdomains", "key_type", "key_usage", "max_ttl", "no_store"); bad != nil {
		return bad
	}
	r := &leafRole{uris: c.list("allowed_uri_sans"), dns: c.list("allowed_domains"), keyType: c.string("key_type"), keyUsage: c.list("key_usage"), requireCN: true}
	if r.keyType == "" {
		r.keyType = "rsa"
	}
	var err, terr error
	if _, given := c.body["require_cn"]; given {
		r.requireCN, err = c.truth("require_cn")
	}
	if r.maxTTL, terr = c.duration("max_ttl"); err != nil || terr != nil {
		return failure(http.StatusBadRequest, "%v", errors.Join(err, terr))
	}
	if p.roles == nil {
		p.roles = make(map[string]*leafRole)
	}
	p.roles[name] = r
	return &answer{status: http.StatusOK, data: map[string]any{}}
}

// signLeaf serves sign/:role. mu is held.
func (s *Server) signLeaf(c *call, p *pki, name string) *answer {
	if busy := s.busy(c); busy != nil {
		return busy
	}
	if bad := s.only(c, leafParameters...); bad != nil {
		return bad
	}
	r := p.roles[name]
	if r == nil {
		return failure(http.StatusBadRequest, "unknown role: %s", name)
	}
	csr, bad := c.parseCSR()
	if bad != nil {
		return bad
	}
	if r.requireCN && csr.Subject.CommonName == "" && c.string("common_name") == "" {
		return failure(http.StatusBadRequest, "the common_name field is required, or must be provided in a CSR with \"use_csr_common_name\" set to true, unless \"require_cn\" is set to false")
	}
	if kind := map[x509.PublicKeyAlgorithm]string{x509.ECDSA: "ec", x509.RSA: "rsa"}[csr.PublicKeyAlgorithm]; r.keyType != "any" && r.keyType != kind {
		return failure(http.StatusBadRequest, "role requires keys of type %s", r.keyType)
	}
	for _, u := range csr.URIs {
		if !slices.ContainsFunc(r.uris, func(glob string) bool {
			prefix, any := strings.CutSuffix(glob, "*")
			return glob == u.String() || any && strings.HasPrefix(u.String(), prefix)
		}) {
			return failure(http.StatusBadRequest, "URI Subject Alternative Names are not allowed in this role, but were provided via CSR")
		}
	}
	for _, d := range csr.DNSNames {
		if !slices.ContainsFunc(r.dns, func(domain string) bool { return strings.HasSuffix(d, "."+domain) }) {
			return failure(http.StatusBadRequest, "subject alternate name %s not allowed by this role", d)
		}
	}
	if !slices.Equal(r.keyUsage, []string{"DigitalSignature"}) {
		s.t.Errorf("the role has the key usages %q", r.keyUsage)
	}
	ttl, err := c.duration("ttl")
	if err != nil || ttl <= 0 {
		return failure(http.StatusBadRequest, "ttl %v: %v", c.body["ttl"], err)
	}
	if longest := min(r.maxTTL, p.maxTTL); longest > 0 {
		ttl = min(ttl, longest)
	}
	return s.signed(s.authority.Leaf(csr.Raw, ttl))
}

// signParameters are those of sign-intermediate.
var signParameters = []string{
	"csr", "common_name", "alt_names", "ip_sans", "uri_sans", "other_sans", "ttl", "format", "max_path_length", "exclude_cn_from_sans",
	"use_csr_values", "permitted_dns_domains", "ou", "organization", "country", "locality", "province", "street_address", "postal_code",
	"serial_number", "not_before_duration", "not_after", "signature_bits", "skid", "use_pss", "issuer_ref",
}

func (s *Server) tune(c *call, p *pki) *answer {
	if bad := s.only(c, "max_lease_ttl", "default_lease_ttl"); bad != nil {
		return bad
	}
	d, err := c.duration("max_lease_ttl")
	if err != nil {
		return failure(http.StatusBadRequest, "%v", err)
	}
	p.maxTTL = d
	return &answer{status: http.StatusNoContent}
}

// servePKI serves a path below a mount. mu is held.
func (s *Server) servePKI(c *call, p *pki, path string) *answer {
	issuer, below, isIssuer := "default", "", false
	if rest, ok := strings.CutPrefix(path, "issuer/"); ok {
		issuer, below, isIssuer = strings.Cut(rest, "/")
	}
	known := issuer == "default" || slices.Contains(p.issuers, issuer)
	switch {
	// What needs no token.
	case path == "cert/ca_chain" && c.Method == http.MethodGet:
		text := strings.TrimSpace(string(upstreamtest.PEM(s.chain()...)))
		return &answer{status: http.StatusOK, data: map[string]any{"certificate": text, "ca_chain": text, "revocation_time": 0, "revocation_time_rfc3339": ""}}
	case isIssuer && below == "json" && c.Method == http.MethodGet:
		if !known {
			return failure(http.StatusInternalServerError, "1 error occurred:\n\t* unable to find PKI issuer for reference: %s\n\n", issuer)
		}
		return &answer{status: http.StatusOK, data: map[string]any{
			"certificate": string(upstreamtest.PEM(s.authority.Issuer)), "ca_chain": texts(s.chain()), "issuer_id": "c2b0b2b8-ecdd-4a7d-a8fb-1f0b5d4a7d3e", "issuer_name": issuer,
		}}
	case !s.allowed(c):
		return denied()
	case path == "config/issuers" && c.Method != http.MethodGet:
		if bad := s.only(c, "default"); bad != nil {
			return bad
		}
		p.issuers = append(p.issuers, c.string("default"))
		return &answer{status: http.StatusOK, data: map[string]any{"default": c.string("default")}}
	case c.Method != http.MethodGet && (path == "root/sign-intermediate" || isIssuer && below == "sign-intermediate"):
		if !known {
			return failure(http.StatusInternalServerError, "1 error occurred:\n\t* unable to find PKI issuer for reference: %s\n\n", issuer)
		}
		return s.sign(c, p)
	case c.Method != http.MethodGet && strings.HasPrefix(path, "roles/"):
		return s.makeRole(c, p, strings.TrimPrefix(path, "roles/"))
	case c.Method != http.MethodGet && strings.HasPrefix(path, "sign/"):
		return s.signLeaf(c, p, strings.TrimPrefix(path, "sign/"))
	case c.Method != http.MethodGet && isIssuer && known && strings.HasPrefix(below, "sign/"):
		return s.signLeaf(c, p, strings.TrimPrefix(below, "sign/"))
	}
	return failure(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n")
}

// chain is that of the issuer, up to its root.
func (s *Server) chain() []*x509.Certificate {
	if s.behaviour == upstreamtest.NoRoot {
		return []*x509.Certificate{s.authority.Issuer}
	}
	return []*x509.Certificate{s.authority.Issuer, s.authority.Root}
}

func texts(all []*x509.Certificate) []string {
	var out []string
	for _, c := range all {
		out = append(out, strings.TrimSpace(string(upstreamtest.PEM(c))))
	}
	return out
}

// notIDNA is what no DNS name has, so that a common name with it cannot be one.
var notIDNA = regexp.MustCompile(`[^A-Za-z0-9.-]`)

// busy is what comes in place of an answer, nil if one does. mu is held.
func (s *Server) busy(c *call) *answer {
	switch s.behaviour { //nolint:exhaustive // the others answer
	case upstreamtest.Slow:
		s.mu.Unlock()
		<-c.Context().Done()
		s.mu.Lock()
		return &answer{status: http.StatusOK, raw: "too late"}
	case upstreamtest.Garbage:
		return &answer{status: http.StatusOK, raw: "<html>"}
	}
	return nil
}

// sign serves sign-intermediate. mu is held.
func (s *Server) sign(c *call, p *pki) *answer {
	if busy := s.busy(c); busy != nil {
		return busy
	}
	if bad := s.only(c, signParameters...); bad != nil {
		return bad
	}
	csr, bad := c.parseCSR()
	if bad != nil {
		return bad
	}
	if format := c.string("format"); !slices.Contains([]string{"", "pem", "der", "pem_bundle"}, format) {
		return failure(http.StatusBadRequest, `The "format" path parameter must be "pem" or "der"`)
	} else if format == "der" {
		s.t.Error("this fake answers in PEM only")
	}
	useCSR, err := c.truth("use_csr_values")
	if err != nil {
		return failure(http.StatusBadRequest, "%v", err)
	}
	excluded, err := c.truth("exclude_cn_from_sans")
	if err != nil {
		return failure(http.StatusBadRequest, "%v", err)
	}
	name := csr.Subject.CommonName
	if given := c.string("common_name"); given != "" {
		name = given
	}
	if !excluded && notIDNA.MatchString(name) {
		return failure(http.StatusBadRequest, "idna: disallowed rune %U", []rune(notIDNA.FindString(name))[0])
	}
	if !useCSR {
		s.t.Error("without use_csr_values the certificate has none of the CSR's names")
	}
	if n, err := c.number("max_path_length"); err != nil || n != 0 {
		s.t.Errorf("max_path_length is %v, want 0 (%v)", c.body["max_path_length"], err)
	}
	ttl, err := c.duration("ttl")
	if err != nil || ttl <= 0 {
		return failure(http.StatusBadRequest, "ttl %v: %v", c.body["ttl"], err)
	}
	var warnings []string
	if ttl > p.maxTTL {
		warnings = append(warnings, "TTL "+ttl.String()+" is longer than permitted maxTTL "+p.maxTTL.String()+", so maxTTL is being used")
		ttl = p.maxTTL
	}
	answer := s.signed(s.authority.Answer(csr.Raw, ttl))
	answer.warnings = warnings
	return answer
}

// signed is the answer with what was signed.
func (s *Server) signed(chain, roots []*x509.Certificate) *answer {
	if len(chain) == 0 {
		return failure(http.StatusInternalServerError, "error signing cert")
	}
	issuing := s.authority.Issuer
	if len(chain) == 1 { // the chain is missing
		issuing = chain[0]
	}
	// The signed certificate is repeated in the chain since 1.11.
	return &answer{status: http.StatusOK, data: map[string]any{
		"certificate": texts(chain)[0], "issuing_ca": texts([]*x509.Certificate{issuing})[0], "ca_chain": texts(append(slices.Clone(chain), roots...)),
		"serial_number": chain[0].SerialNumber.Text(16), "expiration": chain[0].NotAfter.Unix(),
	}}
}
