package vault

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// token is one that was given out.
type token struct {
	id                string
	policies          []string
	life, most        time.Duration // 0: it does not end; most is its longest life, renewals included
	period            time.Duration
	created, ends     time.Time
	renewable         bool
	numbered          bool
	uses              int            // left, if numbered
	wrapped, wrapInfo map[string]any // what it unwraps, for a wrapping token
}

// mint registers a token. mu is held, unless the server has not started.
func (s *Server) mint(t *token) *token {
	t.id, t.created = "hvs."+rand.Text(), s.now()
	if t.period > 0 {
		t.life = t.period
	}
	if t.life > 0 {
		t.ends = t.created.Add(t.life)
	}
	s.tokens[t.id] = t
	return t
}

// use returns a token that lives, and counts its use. mu is held.
func (s *Server) use(id string) *token {
	t := s.tokens[id]
	if t == nil {
		return nil
	}
	if t.life > 0 && !s.now().Before(t.ends) {
		delete(s.tokens, id)
		return nil
	}
	if t.numbered {
		if t.uses--; t.uses == 0 {
			delete(s.tokens, id) // after this use
		}
	}
	return t
}

func (s *Server) left(t *token) int64 {
	if t.life == 0 {
		return 0
	}
	return int64(t.ends.Sub(s.now()).Round(time.Second) / time.Second)
}

func (s *Server) authAnswer(t *token) *answer {
	return &answer{status: http.StatusOK, auth: map[string]any{
		"client_token": t.id, "accessor": rand.Text(), "policies": t.policies, "token_policies": t.policies, "metadata": nil,
		"lease_duration": s.left(t), "renewable": t.renewable, "entity_id": "", "token_type": "service", "orphan": true, "mfa_requirement": nil, "num_uses": t.uses,
	}}
}

// serveToken serves auth/token. mu is held.
func (s *Server) serveToken(c *call) *answer {
	if !s.allowed(c) {
		return denied()
	}
	switch path := strings.TrimPrefix(c.path, "auth/token/"); {
	case path == "lookup-self" && c.Method == http.MethodGet:
		t := c.token
		data := map[string]any{
			"id": t.id, "policies": t.policies, "num_uses": t.uses, "creation_time": t.created.Unix(), "creation_ttl": int64(t.life / time.Second),
			"ttl": s.left(t), "renewable": t.renewable, "explicit_max_ttl": int64(t.most / time.Second), "type": "service", "expire_time": nil, "orphan": true,
		}
		if t.life > 0 {
			data["expire_time"] = t.ends.UTC().Format(time.RFC3339Nano)
		}
		return &answer{status: http.StatusOK, data: data}
	case path == "renew-self" && c.Method != http.MethodGet:
		if bad := s.only(c, "increment"); bad != nil {
			return bad
		}
		t := c.token
		if !t.renewable {
			return failure(http.StatusBadRequest, "lease is not renewable")
		}
		t.ends = s.now().Add(t.life)
		if end := t.created.Add(t.most); t.most > 0 && t.period == 0 && t.ends.After(end) {
			t.ends = end
		}
		return s.authAnswer(t)
	case path == "create" && c.Method != http.MethodGet:
		if bad := s.only(c, "policies", "period", "ttl", "explicit_max_ttl", "renewable", "no_default_policy", "num_uses", "display_name", "type", "no_parent"); bad != nil {
			return bad
		}
		r, bad := s.parseRole(c, "")
		if bad != nil {
			return bad
		}
		noDefault, err := c.truth("no_default_policy")
		if err != nil {
			return failure(http.StatusBadRequest, "%v", err)
		}
		r.policies = c.list("policies")
		t := r.token()
		if noDefault {
			t.policies = slices.DeleteFunc(t.policies, func(p string) bool { return p == "default" })
		}
		if c.body["renewable"] != nil {
			if t.renewable, err = c.truth("renewable"); err != nil {
				return failure(http.StatusBadRequest, "%v", err)
			}
		}
		return s.authAnswer(s.mint(t))
	}
	return failure(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n")
}

// auth is a mount of an auth method.
type auth struct {
	kind       string
	configured bool
	roles      map[string]*role
}

// role is one of an auth method.
type role struct {
	policies          []string
	ttl, most, period time.Duration
	tokenUses         int

	// approle
	id         string
	secretUses int
	secretTTL  time.Duration
	secrets    map[string]*secretID
	// kubernetes
	accounts, namespaces []string
	audience             string
	// cert
	pool                *x509.CertPool
	commonNames, uriSAN []string
}

type secretID struct {
	uses int // 0: any number
	ends time.Time
}

// token is one for the role, not registered.
func (r *role) token() *token {
	t := &token{policies: append([]string{"default"}, r.policies...), life: r.ttl, most: r.most, period: r.period, renewable: true, uses: r.tokenUses, numbered: r.tokenUses > 0}
	if t.life == 0 && t.period == 0 {
		t.life = 32 * 24 * time.Hour // the system's default
	}
	return t
}

// roleParameters are those of a role, by the kind of its method; tokenParameters are
// of all.
var (
	tokenParameters = []string{
		"token_policies", "token_ttl", "token_max_ttl", "token_period", "token_num_uses", "token_no_default_policy", "token_type", "token_bound_cidrs",
		"token_explicit_max_ttl", "policies",
	}
	roleParameters = map[string][]string{
		"approle":    {"bind_secret_id", "secret_id_num_uses", "secret_id_ttl", "secret_id_bound_cidrs"},
		"kubernetes": {"bound_service_account_names", "bound_service_account_namespaces", "audience", "alias_name_source"},
		"cert":       {"certificate", "allowed_common_names", "allowed_dns_sans", "allowed_uri_sans", "display_name"},
	}
)

// parseRole reads what roles of all kinds have; prefix is "token_" for those of
// auth methods.
func (s *Server) parseRole(c *call, prefix string) (*role, *answer) {
	r := &role{policies: c.list(prefix + "policies")}
	var err error
	fail := func(d *time.Duration, name string) {
		v, e := c.duration(name)
		if *d = v; e != nil {
			err = e
		}
	}
	fail(&r.ttl, prefix+"ttl")
	longest := "explicit_max_ttl"
	if prefix != "" {
		longest = prefix + "max_ttl"
	}
	fail(&r.most, longest)
	fail(&r.period, prefix+"period")
	fail(&r.secretTTL, "secret_id_ttl")
	n, e := c.number(prefix + "num_uses")
	uses, e2 := c.number("secret_id_num_uses")
	r.tokenUses, r.secretUses = n, uses
	for _, e := range []error{err, e, e2} {
		if e != nil {
			return nil, failure(http.StatusBadRequest, "%v", e)
		}
	}
	return r, nil
}

// serveAuth serves a path below the mount of an auth method. mu is held.
func (s *Server) serveAuth(c *call, mount string, a *auth, path string) *answer {
	if path == "login" && c.Method != http.MethodGet {
		return s.login(c, a)
	}
	if !s.allowed(c) {
		return denied()
	}
	prefix := map[string]string{"approle": "role/", "kubernetes": "role/", "cert": "certs/"}[a.kind]
	if path == "config" && a.kind == "kubernetes" {
		if bad := s.only(c, "kubernetes_host", "kubernetes_ca_cert", "token_reviewer_jwt", "disable_local_ca_jwt"); bad != nil {
			return bad
		}
		if c.string("kubernetes_host") == "" {
			return failure(http.StatusBadRequest, "no host provided")
		}
		a.configured = true
		return &answer{status: http.StatusNoContent}
	}
	name, ok := strings.CutPrefix(path, prefix)
	if !ok {
		return failure(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n")
	}
	name, below, _ := strings.Cut(name, "/")
	if below != "" {
		return s.serveAppRole(c, mount, a, name, below)
	}
	if c.Method == http.MethodGet {
		return failure(http.StatusMethodNotAllowed, "this fake does not read roles")
	}
	if bad := s.only(c, append(roleParameters[a.kind], tokenParameters...)...); bad != nil {
		return bad
	}
	r, bad := s.parseRole(c, "token_")
	if bad != nil {
		return bad
	}
	r.id, r.secrets = rand.Text(), map[string]*secretID{}
	r.accounts, r.namespaces, r.audience = c.list("bound_service_account_names"), c.list("bound_service_account_namespaces"), c.string("audience")
	r.commonNames, r.uriSAN = c.list("allowed_common_names"), c.list("allowed_uri_sans")
	switch a.kind {
	case "kubernetes":
		if len(r.accounts) == 0 {
			return failure(http.StatusBadRequest, `"bound_service_account_names" can not be empty`)
		}
		if len(r.namespaces) == 0 {
			return failure(http.StatusBadRequest, `"bound_service_account_namespaces" can not be empty`)
		}
	case "cert":
		r.pool = x509.NewCertPool()
		if !r.pool.AppendCertsFromPEM([]byte(c.string("certificate"))) {
			return failure(http.StatusBadRequest, "failed to parse certificate")
		}
	}
	a.roles[name] = r
	return &answer{status: http.StatusNoContent}
}

// serveAppRole serves what is below an AppRole. mu is held.
func (s *Server) serveAppRole(c *call, mount string, a *auth, name, below string) *answer {
	r := a.roles[name]
	if a.kind != "approle" || r == nil {
		return failure(http.StatusNotFound, "role %q does not exist", name)
	}
	switch {
	case below == "role-id" && c.Method == http.MethodGet:
		return &answer{status: http.StatusOK, data: map[string]any{"role_id": r.id}}
	case below == "secret-id" && c.Method != http.MethodGet:
		if bad := s.only(c, "metadata", "cidr_list", "ttl", "num_uses"); bad != nil {
			return bad
		}
		id, entry := rand.Text(), &secretID{uses: r.secretUses}
		if r.secretTTL > 0 {
			entry.ends = s.now().Add(r.secretTTL)
		}
		r.secrets[id] = entry
		data := map[string]any{"secret_id": id, "secret_id_accessor": rand.Text(), "secret_id_num_uses": r.secretUses, "secret_id_ttl": int64(r.secretTTL / time.Second)}
		if ttl := c.Header.Get("X-Vault-Wrap-TTL"); ttl != "" {
			return s.wrap(ttl, "auth/"+mount+"/role/"+name+"/secret-id", data)
		}
		return &answer{status: http.StatusOK, data: data}
	}
	return failure(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n")
}

// login serves the login of a method. mu is held.
func (s *Server) login(c *call, a *auth) *answer {
	var r *role
	var bad *answer
	switch a.kind {
	case "approle":
		r, bad = s.appRole(c, a)
	case "kubernetes":
		r, bad = s.kubernetes(c, a)
	case "cert":
		r, bad = s.cert(c, a)
	}
	if bad != nil {
		return bad
	}
	return s.authAnswer(s.mint(r.token()))
}

func (s *Server) appRole(c *call, a *auth) (*role, *answer) {
	if bad := s.only(c, "role_id", "secret_id"); bad != nil {
		return nil, bad
	}
	id, secret := c.string("role_id"), c.string("secret_id")
	if id == "" {
		return nil, failure(http.StatusBadRequest, "missing role_id")
	}
	for _, r := range a.roles {
		if r.id != id {
			continue
		}
		if secret == "" {
			return nil, failure(http.StatusBadRequest, "missing secret_id")
		}
		entry := r.secrets[secret]
		if entry == nil || !entry.ends.IsZero() && s.now().After(entry.ends) {
			delete(r.secrets, secret)
			// One of the original's errors says which it was.
			return nil, failure(http.StatusBadRequest, "invalid secret_id %q", secret)
		}
		if entry.uses == 1 {
			delete(r.secrets, secret)
		} else if entry.uses > 1 {
			entry.uses--
		}
		return r, nil
	}
	return nil, failure(http.StatusBadRequest, "invalid role or secret ID")
}

// serviceAccount are the claims of a token that a kubelet has projected.
type serviceAccount struct {
	jwt.Claims
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount struct {
			Name string `json:"name"`
			UID  string `json:"uid"`
		} `json:"serviceaccount"`
	} `json:"kubernetes.io"`
}

// ServiceAccountToken returns a token as a kubelet projects it, for ten minutes.
func (s *Server) ServiceAccountToken(namespace, name, audience string) string {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: s.serviceKey}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	claims := serviceAccount{Claims: jwt.Claims{
		Issuer: "https://kubernetes.default.svc", Subject: "system:serviceaccount:" + namespace + ":" + name,
		Audience: jwt.Audience{audience}, Expiry: jwt.NewNumericDate(s.now().Add(10 * time.Minute)),
	}}
	claims.Kubernetes.Namespace = namespace
	claims.Kubernetes.ServiceAccount.Name, claims.Kubernetes.ServiceAccount.UID = name, rand.Text()
	text, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return text
}

func (s *Server) kubernetes(c *call, a *auth) (*role, *answer) {
	if bad := s.only(c, "role", "jwt"); bad != nil {
		return nil, bad
	}
	for _, name := range []string{"role", "jwt"} {
		if c.string(name) == "" {
			return nil, failure(http.StatusBadRequest, "missing %s", name)
		}
	}
	r := a.roles[c.string("role")]
	switch {
	case r == nil:
		return nil, failure(http.StatusBadRequest, "invalid role name %q", c.string("role"))
	case !a.configured:
		return nil, failure(http.StatusInternalServerError, "could not load backend configuration")
	}
	parsed, err := jwt.ParseSigned(c.string("jwt"), []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, failure(http.StatusForbidden, "%v", err)
	}
	var claims serviceAccount
	if err := parsed.Claims(s.serviceKey.Public(), &claims); err != nil {
		return nil, denied()
	}
	switch {
	case claims.Expiry == nil || s.now().After(claims.Expiry.Time()):
		return nil, failure(http.StatusForbidden, "invalid expiration time (exp) claim: token is expired")
	case r.audience != "" && !slices.Contains(claims.Audience, r.audience):
		return nil, failure(http.StatusForbidden, "invalid audience (aud) claim: audience claim does not match any expected audience")
	case !slices.Contains(r.namespaces, claims.Kubernetes.Namespace) && !slices.Contains(r.namespaces, "*"):
		return nil, failure(http.StatusForbidden, "namespace not authorized")
	case !slices.Contains(r.accounts, claims.Kubernetes.ServiceAccount.Name) && !slices.Contains(r.accounts, "*"):
		return nil, failure(http.StatusForbidden, "service account name not authorized")
	}
	return r, nil
}

func (s *Server) cert(c *call, a *auth) (*role, *answer) {
	if bad := s.only(c, "name"); bad != nil {
		return nil, bad
	}
	var shown []*x509.Certificate
	if c.TLS != nil {
		shown = c.TLS.PeerCertificates
	}
	if len(shown) == 0 {
		return nil, failure(http.StatusBadRequest, "client certificate must be supplied")
	}
	intermediates := x509.NewCertPool()
	for _, i := range shown[1:] {
		intermediates.AddCert(i)
	}
	for name, r := range a.roles {
		if want := c.string("name"); want != "" && want != name {
			continue
		}
		_, err := shown[0].Verify(x509.VerifyOptions{Roots: r.pool, Intermediates: intermediates, CurrentTime: s.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if err != nil {
			continue
		}
		if len(r.commonNames) > 0 && !slices.Contains(r.commonNames, shown[0].Subject.CommonName) {
			return nil, failure(http.StatusBadRequest, "no chain matching all constraints could be found for this login certificate")
		}
		return r, nil
	}
	return nil, failure(http.StatusBadRequest, "invalid certificate or no client certificate supplied")
}

// ClientCertificate returns a client certificate of a name, and its key, in PEM, and
// the CA that issued it.
func (s *Server) ClientCertificate(name string) (certificate, key, ca []byte) {
	s.t.Helper()
	caKey, own := newKey(s.t), newKey(s.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	encode := func(der []byte, err error) ([]byte, *x509.Certificate) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			s.t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), parsed
	}
	ca, parent := encode(x509.CreateCertificate(rand.Reader, template, template, caKey.Public(), caKey))
	certificate, _ = encode(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{{Scheme: "spiffe", Host: "machines.test", Path: "/" + name}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, parent, own.Public(), caKey))
	der, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		s.t.Fatal(err)
	}
	key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if _, err := tls.X509KeyPair(certificate, key); err != nil {
		s.t.Fatal(err)
	}
	return certificate, key, ca
}

// wrap keeps an answer for whoever has the token that is answered instead. mu is
// held.
func (s *Server) wrap(ttl, path string, data map[string]any) *answer {
	d, err := (&call{body: map[string]any{"ttl": ttl}}).duration("ttl")
	if err != nil {
		return failure(http.StatusBadRequest, "%v", err)
	}
	info := map[string]any{"creation_path": path, "creation_time": s.now().UTC().Format(time.RFC3339Nano), "creation_ttl": int64(d / time.Second)}
	t := s.mint(&token{policies: []string{"response-wrapping"}, life: d, numbered: true, uses: 1, wrapped: data, wrapInfo: info})
	wrapped := maps.Clone(info)
	wrapped["token"], wrapped["ttl"], wrapped["accessor"] = t.id, int64(d/time.Second), rand.Text()
	return &answer{status: http.StatusOK, wrap: wrapped}
}

// Wrap returns a token that wraps data, made by a path of anybody's.
func (s *Server) Wrap(path string, data map[string]any) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, _ := s.wrap("600", path, data).wrap["token"].(string)
	return id
}

// serveWrapping serves sys/wrapping. mu is held.
func (s *Server) serveWrapping(c *call) *answer {
	invalid := failure(http.StatusBadRequest, "wrapping token is not valid or does not exist")
	if bad := s.only(c, "token"); bad != nil {
		return bad
	}
	switch strings.TrimPrefix(c.path, "sys/wrapping/") {
	case "lookup": // needs no token beside that one
		t := s.tokens[c.string("token")]
		if t == nil || t.wrapped == nil || !s.now().Before(t.ends) {
			return invalid
		}
		return &answer{status: http.StatusOK, data: t.wrapInfo}
	case "unwrap":
		if c.token == nil || c.token.wrapped == nil {
			return invalid
		}
		if !s.allowed(c) {
			return denied()
		}
		// As after a journey through storage.
		data, err := json.Marshal(c.token.wrapped)
		if err != nil {
			s.t.Error(err)
		}
		var out map[string]any
		if err := json.Unmarshal(data, &out); err != nil {
			s.t.Error(err)
		}
		return &answer{status: http.StatusOK, data: out}
	}
	return failure(http.StatusNotFound, "1 error occurred:\n\t* unsupported path\n\n")
}
