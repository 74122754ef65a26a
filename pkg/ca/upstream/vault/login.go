package vault

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	// never is until when a token lives that does not end.
	never = 100 * 365 * 24 * time.Hour
	// slack is what is left of a token that is still used.
	slack      = 5 * time.Second
	lookupSelf = "auth/token/lookup-self"
	// renewAgain is the least time between two renewals.
	renewAgain = time.Second
)

// lease is a token and how long it lives.
type lease struct {
	number    int // of the login
	token     string
	life      time.Duration // when it was new; 0 if it does not end
	ends      time.Time     // wall time
	renewable bool
}

func newLease(token string, life time.Duration, renewable bool, now time.Time) lease {
	l := lease{token: token, life: life, renewable: renewable, ends: now.Add(life)}
	if life == 0 {
		l.ends, l.renewable = now.Add(never), false
	}
	return l
}

// usable says whether the token is there and lives.
func (l lease) usable(now time.Time) bool { return l.token != "" && l.ends.Sub(now) > slack }

// dueIn is how long the token need not be renewed or replaced: until half of its
// life is over.
func (l lease) dueIn(now time.Time) time.Duration {
	if l.token == "" {
		return 0
	}
	if l.life == 0 {
		return never
	}
	return max(0, l.ends.Add(-l.life/2).Sub(now))
}

// session is the token in use.
type session struct {
	lock   chan struct{} // has room for whoever may use what follows; held during logins, so that nothing is used up twice
	lease  lease
	logins int
}

func newSession() session { return session{lock: make(chan struct{}, 1)} }

// acquire takes the session, unless ctx ends before.
func (s *session) acquire(ctx context.Context) error {
	select {
	case s.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: wait for a login: %w", upstream.ErrUnavailable, context.Cause(ctx))
	}
}

func (s *session) release() { <-s.lock }

// method is a way to have a token.
type method interface {
	// login returns a new token.
	login(ctx context.Context, v *CA, c *connection) (lease, error)
	// what names what the operator has to look at when it is refused.
	what() string
}

// newMethod returns the one that is configured.
func newMethod(c Config) (method, error) {
	var all []method
	if c.TokenFile != "" {
		all = append(all, tokenFile(c.TokenFile))
	}
	if a := c.AppRole; a.RoleID != "" || a.SecretIDFile != "" || a.Wrapped {
		if a.RoleID == "" || a.SecretIDFile == "" {
			return nil, errors.New("approle: set role_id to what `vault read auth/approle/role/NAME/role-id` shows, and secret_id_file to the path of the secret ID")
		}
		all = append(all, &appRole{AppRole: a})
	}
	if k := c.Kubernetes; k.Role != "" || k.TokenFile != "" {
		if k.Role == "" {
			return nil, errors.New("kubernetes: set role to the name of a role in auth/" + k.Mount)
		}
		if k.TokenFile == "" {
			k.TokenFile = "/var/run/secrets/kubernetes.io/serviceaccount/token"
		}
		all = append(all, kubernetes(k))
	}
	if t := c.Certificate; t.Certificate != "" || t.Key != "" || t.Role != "" {
		if t.Certificate == "" || t.Key == "" {
			return nil, errors.New("certificate: set certificate and key to the paths of the client certificate and its private key")
		}
		all = append(all, certificate(t))
	}
	if len(all) != 1 {
		return nil, errors.New("set one of token_file, approle, kubernetes and certificate: how to log in")
	}
	for _, path := range []string{c.TokenFile, c.AppRole.SecretIDFile} {
		if path == "" {
			continue
		}
		if _, err := readToken(path); err != nil {
			return nil, err
		}
	}
	return all[0], nil
}

// readToken reads a secret of one line.
func readToken(path string) (string, error) {
	data, err := upstream.ReadSecret(path)
	if err != nil {
		return "", err
	}
	defer clear(data)
	return oneLine(path, data)
}

func oneLine(path string, data []byte) (string, error) {
	text := strings.TrimSpace(string(data))
	if text == "" || strings.ContainsAny(text, "\r\n\t ") {
		return "", fmt.Errorf("%s: want one line with nothing but the token or secret ID", path)
	}
	return text, nil
}

// withToken makes a call with a token. One that is not valid any more is replaced,
// once. A valid one that may not make the call is not: logins can be numbered.
func (v *CA) withToken(ctx context.Context, c *connection, call func(token string) error) error {
	l, fresh, err := v.current(ctx, c, 0)
	if err != nil {
		return err
	}
	err = call(l.token)
	status, ok := errors.AsType[*upstream.StatusError](err)
	if !ok || status.Code != http.StatusForbidden || fresh || v.call(ctx, c, http.MethodGet, lookupSelf, l.token, nil, nil) == nil {
		return err
	}
	if l, _, err = v.current(ctx, c, l.number); err != nil {
		return fmt.Errorf("the token is refused, and so is a new one: %w", err)
	}
	return call(l.token)
}

// current returns a token that lives and has not the number of a refused one, and
// whether it is new.
func (v *CA) current(ctx context.Context, c *connection, refused int) (l lease, fresh bool, err error) {
	if err := v.session.acquire(ctx); err != nil {
		return lease{}, false, err
	}
	defer v.session.release()
	if l := v.session.lease; l.usable(now()) && l.number != refused {
		return l, false, nil
	}
	if err := v.loginLocked(ctx, c); err != nil {
		return lease{}, false, err
	}
	return v.session.lease, true, nil
}

// loginLocked replaces the token. The session is held.
func (v *CA) loginLocked(ctx context.Context, c *connection) error {
	// What can be used once is not sent over a connection that the server may be about
	// to close.
	c, done, err := c.alone()
	if err != nil {
		return err
	}
	defer done()
	l, err := v.method.login(ctx, v, c)
	if err != nil {
		v.session.lease = lease{}
		if errors.Is(err, upstream.ErrDenied) {
			err = fmt.Errorf("%w: look at %s", err, v.method.what())
		}
		return err
	}
	v.session.logins++
	l.number = v.session.logins
	v.session.lease = l
	return nil
}

// keepAlive renews the token when half of its life is over, or has a new one where
// that cannot be; next is when it is due again.
func (v *CA) keepAlive(ctx context.Context, c *connection) (next time.Duration, err error) {
	if err := v.session.acquire(ctx); err != nil {
		return 0, err
	}
	defer v.session.release()
	l := v.session.lease
	if l.dueIn(now()) > 0 {
		return max(l.dueIn(now()), renewAgain), nil
	}
	renewed := false
	if l.renewable {
		if renewed, err = v.renewLocked(ctx, c); err != nil {
			return 0, err
		}
	}
	if !renewed {
		if err := v.loginLocked(ctx, c); err != nil {
			return 0, fmt.Errorf("have a new token in time: %w", err)
		}
		if l := v.session.lease; l.dueIn(now()) == 0 {
			return 0, fmt.Errorf("%w: the token ends at %s and cannot be renewed: look at %s", upstream.ErrDenied, l.ends.UTC().Format(time.RFC3339), v.method.what())
		}
	}
	return max(v.session.lease.dueIn(now()), renewAgain), nil
}

// renewLocked renews the token. It has not if the server refuses, or gives less than
// half of the life that the token had: its longest life is nearly over. The session
// is held.
func (v *CA) renewLocked(ctx context.Context, c *connection) (bool, error) {
	old := v.session.lease
	l, err := v.login(ctx, c, "auth/token/renew-self", old.token, map[string]any{})
	switch {
	case errors.Is(err, upstream.ErrDenied):
		return false, nil // a new one, or the reason why there is none
	case err != nil:
		return false, fmt.Errorf("renew the token: %w", err)
	case l.life < old.life/2:
		return false, nil
	}
	l.life, l.number = max(l.life, old.life), old.number
	v.session.lease = l
	return true, nil
}

// login makes a call that answers with a token.
func (v *CA) login(ctx context.Context, c *connection, path, token string, in any, secrets ...string) (lease, error) {
	var answer struct {
		Auth *struct {
			ClientToken   string `json:"client_token"`
			LeaseDuration int64  `json:"lease_duration"`
			Renewable     bool   `json:"renewable"`
			MFA           *struct {
				RequestID string `json:"mfa_request_id"`
			} `json:"mfa_requirement"`
		} `json:"auth"`
	}
	start := now()
	if err := v.call(ctx, c, http.MethodPost, path, token, in, &answer, secrets...); err != nil {
		return lease{}, err
	}
	switch a := answer.Auth; {
	case a == nil:
		return lease{}, fmt.Errorf("the answer of vault to %s has no token", path)
	case a.MFA != nil:
		return lease{}, fmt.Errorf("%w: vault wants a second factor for %s: take this role out of it", upstream.ErrDenied, path)
	case a.ClientToken == "" || strings.ContainsAny(a.ClientToken, "\r\n") || a.LeaseDuration < 0 || a.LeaseDuration > int64(never/time.Second):
		return lease{}, fmt.Errorf("the answer of vault to %s has no token, or a life of %d seconds", path, a.LeaseDuration)
	default:
		return newLease(a.ClientToken, time.Duration(a.LeaseDuration)*time.Second, a.Renewable, start), nil
	}
}

// tokenFile is the path of a token that somebody else has had made.
type tokenFile string

func (t tokenFile) what() string { return "the token in " + string(t) }

func (t tokenFile) login(ctx context.Context, v *CA, c *connection) (lease, error) {
	token, err := readToken(string(t))
	if err != nil {
		return lease{}, err
	}
	var answer struct {
		Data struct {
			TTL         int64 `json:"ttl"`
			CreationTTL int64 `json:"creation_ttl"`
			Renewable   bool  `json:"renewable"`
		} `json:"data"`
	}
	start := now()
	if err := v.call(ctx, c, http.MethodGet, lookupSelf, token, nil, &answer); err != nil {
		return lease{}, err
	}
	d := answer.Data
	if d.TTL < 0 || d.TTL > int64(never/time.Second) || d.CreationTTL > 0 && d.TTL == 0 {
		return lease{}, fmt.Errorf("%w: the token in %s has ended", upstream.ErrDenied, string(t))
	}
	l := newLease(token, time.Duration(d.TTL)*time.Second, d.Renewable, start)
	if l.life > 0 && d.CreationTTL > d.TTL {
		l.life = time.Duration(min(d.CreationTTL, int64(never/time.Second))) * time.Second
	}
	return l, nil
}

// appRole logs in with a secret ID. The session's lock guards it.
type appRole struct {
	AppRole

	// unwrapped is the secret ID that was in the wrapping token with this hash.
	unwrapped string
	wrapping  [sha256.Size]byte
}

func (a *appRole) what() string {
	return fmt.Sprintf("role_id and %s, and the role in auth/%s", a.SecretIDFile, a.Mount)
}

func (a *appRole) login(ctx context.Context, v *CA, c *connection) (lease, error) {
	secret, err := readToken(a.SecretIDFile)
	if err != nil {
		return lease{}, err
	}
	if a.Wrapped {
		if secret, err = a.unwrap(ctx, v, c, secret); err != nil {
			return lease{}, err
		}
	}
	return v.login(ctx, c, "auth/"+a.Mount+"/login", "", map[string]string{"role_id": a.RoleID, "secret_id": secret}, secret)
}

// unwrap has the secret ID that is in a wrapping token, which can be done once. What
// was not made by this auth method is somebody's attempt to give us his own.
func (a *appRole) unwrap(ctx context.Context, v *CA, c *connection, wrapping string) (string, error) {
	hash := sha256.Sum256([]byte(wrapping))
	if a.unwrapped != "" && hash == a.wrapping {
		return a.unwrapped, nil
	}
	fail := func(err error) (string, error) {
		if errors.Is(err, upstream.ErrDenied) {
			err = fmt.Errorf("%w: the wrapping token in %s has ended, or somebody else has used it, which then has your secret ID: find out who, and put a new one there", err, a.SecretIDFile)
		}
		return "", err
	}
	var info struct {
		Data struct {
			CreationPath string `json:"creation_path"`
		} `json:"data"`
	}
	if err := v.call(ctx, c, http.MethodPost, "sys/wrapping/lookup", "", map[string]string{"token": wrapping}, &info, wrapping); err != nil {
		return fail(err)
	}
	path := strings.Split(strings.Trim(info.Data.CreationPath, "/"), "/")
	wanted := append(append([]string{"auth"}, strings.Split(a.Mount, "/")...), "role")
	if n := len(path); n < len(wanted)+2 || path[n-1] != "secret-id" || !slices.Equal(path[n-2-len(wanted):n-2], wanted) {
		return "", fmt.Errorf("%w: what is wrapped in %s was made by %.100q, not by auth/%s/role/NAME/secret-id: somebody has put it there in place of the secret ID",
			upstream.ErrDenied, a.SecretIDFile, info.Data.CreationPath, a.Mount)
	}
	var inner struct {
		Data struct {
			SecretID string `json:"secret_id"`
		} `json:"data"`
	}
	if err := v.call(ctx, c, http.MethodPost, "sys/wrapping/unwrap", wrapping, map[string]any{}, &inner); err != nil {
		return fail(err)
	}
	if inner.Data.SecretID == "" {
		return "", fmt.Errorf("what is wrapped in %s has no secret_id", a.SecretIDFile)
	}
	a.unwrapped, a.wrapping = inner.Data.SecretID, hash
	return a.unwrapped, nil
}

// kubernetes logs in with a service account's token.
type kubernetes Kubernetes

func (k kubernetes) what() string {
	return fmt.Sprintf("the role %q in auth/%s: its bound service account, namespace and audience, and %s", k.Role, k.Mount, k.TokenFile)
}

func (k kubernetes) login(ctx context.Context, v *CA, c *connection) (lease, error) {
	// The kubelet replaces it, behind symbolic links.
	data, err := upstream.ReadFile(k.TokenFile)
	if err != nil {
		return lease{}, fmt.Errorf("kubernetes: %w", err)
	}
	jwt, err := oneLine(k.TokenFile, data)
	if err != nil {
		return lease{}, err
	}
	return v.login(ctx, c, "auth/"+k.Mount+"/login", "", map[string]string{"role": k.Role, "jwt": jwt}, jwt)
}

// certificate logs in with the connection's client certificate.
type certificate Certificate

func (t certificate) what() string {
	return fmt.Sprintf("the role %q in auth/%s: its CA, and the names it allows to %s", t.Role, t.Mount, t.Certificate)
}

func (t certificate) login(ctx context.Context, v *CA, c *connection) (lease, error) {
	in := map[string]string{}
	if t.Role != "" {
		in["name"] = t.Role
	}
	return v.login(ctx, c, "auth/"+t.Mount+"/login", "", in)
}

// now is wall time: a machine that slept has a token that is older than it seems.
func now() time.Time { return time.Now().Round(0) }
