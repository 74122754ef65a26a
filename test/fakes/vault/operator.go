package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// Operator is somebody who uses the command `vault`, as far as operators of an
// upstream CA need it.
type Operator struct {
	// Dir is the folder in which files are.
	Dir string
	// Getenv returns VAULT_ADDR, VAULT_CACERT, VAULT_TOKEN and VAULT_NAMESPACE.
	Getenv func(string) string
}

// Run runs the command with its arguments. What it prints is written to out.
func (o *Operator) Run(ctx context.Context, args []string, out io.Writer) error {
	flags := map[string]string{}
	var words []string
	for _, a := range args {
		if name, ok := strings.CutPrefix(a, "-"); ok && a != "-" {
			key, value, _ := strings.Cut(strings.TrimPrefix(name, "-"), "=")
			if old := flags[key]; key == "policy" && old != "" {
				value = old + "," + value
			}
			flags[key] = value
			continue
		}
		words = append(words, a)
	}
	method, path, body, err := o.translate(words, flags)
	if err != nil {
		return err
	}
	answer, err := o.request(ctx, method, path, body, flags["wrap-ttl"])
	if err != nil {
		return err
	}
	field, ok := flags["field"]
	if !ok {
		return nil
	}
	for _, part := range []string{"data", "auth", "wrap_info"} {
		section, _ := answer[part].(map[string]any)
		name := field
		switch {
		case part == "auth" && field == "token":
			name = "client_token"
		case part == "wrap_info" && field == "wrapping_token":
			name = "token"
		}
		if v, ok := section[name]; ok {
			_, err := fmt.Fprint(out, v)
			return err
		}
	}
	return fmt.Errorf("Field %q not present in secret", field) //nolint:staticcheck // as the original says it
}

// translate turns a command into a call of the API.
func (o *Operator) translate(words []string, flags map[string]string) (method, path string, body map[string]any, err error) {
	two := strings.Join(words[:min(2, len(words))], " ")
	switch {
	case two == "policy write" && len(words) == 4:
		text, err := os.ReadFile(filepath.Join(o.Dir, words[3]))
		return http.MethodPut, "sys/policies/acl/" + words[2], map[string]any{"policy": string(text)}, err
	case two == "secrets enable" && len(words) == 3:
		return http.MethodPost, "sys/mounts/" + words[2], map[string]any{"type": words[2]}, nil
	case two == "auth enable" && len(words) == 3:
		return http.MethodPost, "sys/auth/" + words[2], map[string]any{"type": words[2]}, nil
	case two == "secrets tune" && len(words) == 3:
		return http.MethodPost, "sys/mounts/" + strings.Trim(words[2], "/") + "/tune", map[string]any{"max_lease_ttl": flags["max-lease-ttl"]}, nil
	case two == "token create" && len(words) == 2:
		body := map[string]any{"policies": strings.Split(flags["policy"], ",")}
		for flag, name := range map[string]string{"period": "period", "ttl": "ttl", "explicit-max-ttl": "explicit_max_ttl", "use-limit": "num_uses", "renewable": "renewable"} {
			if v, ok := flags[flag]; ok {
				body[name] = v
			}
		}
		return http.MethodPost, "auth/token/create", body, nil
	case len(words) == 2 && words[0] == "read":
		return http.MethodGet, words[1], nil, nil
	case len(words) >= 2 && words[0] == "write":
		body := map[string]any{}
		for _, w := range words[2:] {
			name, value, ok := strings.Cut(w, "=")
			if !ok {
				return "", "", nil, fmt.Errorf("%q is not NAME=VALUE", w)
			}
			if file, ok := strings.CutPrefix(value, "@"); ok {
				text, err := os.ReadFile(filepath.Join(o.Dir, file))
				if err != nil {
					return "", "", nil, err
				}
				value = string(text)
			}
			body[name] = value
		}
		if _, force := flags["f"]; len(body) == 0 && !force {
			return "", "", nil, errors.New("must supply data or use -force")
		}
		return http.MethodPut, words[1], body, nil
	}
	return "", "", nil, fmt.Errorf("this fake has no command %q", two)
}

func (o *Operator) request(ctx context.Context, method, path string, body map[string]any, wrapTTL string) (map[string]any, error) {
	trusted, err := os.ReadFile(o.Getenv("VAULT_CACERT"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(trusted)
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, method, o.Getenv("VAULT_ADDR")+"/v1/"+strings.Trim(path, "/"), bytes.NewReader(encoded))
	if err != nil {
		return nil, err
	}
	for name, value := range map[string]string{
		"X-Vault-Request": "true", "X-Vault-Token": o.Getenv("VAULT_TOKEN"), "X-Vault-Namespace": o.Getenv("VAULT_NAMESPACE"), "X-Vault-Wrap-TTL": wrapTTL,
	} {
		if value != "" {
			r.Header.Set(name, value)
		}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true}}
	answer, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = answer.Body.Close() }() // it was read
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %d: %s", method, path, answer.StatusCode, data)
	}
	if len(data) == 0 {
		return nil, nil //nolint:nilnil // there is nothing to say
	}
	var decoded map[string]any
	return decoded, json.Unmarshal(data, &decoded)
}
