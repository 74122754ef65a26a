package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// StatusError is an answer of the API server that is not 2xx.
type StatusError struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"` // as in metav1.StatusReason, such as NotFound
	Message string `json:"message"`
}

// Error implements error.
func (e *StatusError) Error() string { return fmt.Sprintf("%d %s: %s", e.Code, e.Reason, e.Message) }

// Answer changes an object as a controller does that a test plays: change is merged into
// what is at path. An object that is gone, or a test that is over, is no error.
func (s *APIServer) Answer(t testing.TB, path string, change any) {
	t.Helper()
	err := s.Do(t.Context(), http.MethodPatch, path, change, nil)
	if gone, ok := errors.AsType[*StatusError](err); ok && gone.Code == http.StatusNotFound {
		return
	}
	if err != nil && t.Context().Err() == nil {
		t.Error(err)
	}
}

// Do calls the API server as the administrator. in is sent as JSON (a PATCH as a
// merge patch) unless it is nil; out is read from JSON, or is a *[]byte that gets
// the body as it is, unless it is nil. An answer other than 2xx is a *StatusError.
func (s *APIServer) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.URL+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		e := &StatusError{}
		if json.Unmarshal(answer, e) != nil || e.Code == 0 { // some errors are plain text
			e = &StatusError{Code: resp.StatusCode, Reason: http.StatusText(resp.StatusCode), Message: string(answer)}
		}
		return fmt.Errorf("%s %s: %w", method, path, e)
	}
	switch out := out.(type) {
	case nil:
	case *[]byte:
		*out = answer
	default:
		if err := json.Unmarshal(answer, out); err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
	}
	return nil
}

func (s *APIServer) must(t testing.TB, method, path string, in, out any) {
	t.Helper()
	if err := s.Do(t.Context(), method, path, in, out); err != nil {
		t.Fatal(err)
	}
}

// ensure creates an object unless it is there.
func (s *APIServer) ensure(t testing.TB, path string, object any) {
	t.Helper()
	err := s.Do(t.Context(), http.MethodPost, path, object, nil)
	if status, ok := errors.AsType[*StatusError](err); ok && status.Reason == "AlreadyExists" {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
}

type object = map[string]any

func named(name string) object { return object{"metadata": object{"name": name}} }

// Namespace makes a new namespace, with its service account "default", and returns
// its name. Tests that share a server do not meet in it.
func (s *APIServer) Namespace(t testing.TB) string {
	t.Helper()
	name := s.name("test")
	s.ensureAccount(t, name, "default")
	return name
}

// Account makes a service account, and its namespace, unless they are there.
func (s *APIServer) Account(t testing.TB, namespace, account string) {
	t.Helper()
	s.ensureAccount(t, namespace, account)
}

func (s *APIServer) ensureAccount(t testing.TB, namespace, account string) {
	t.Helper()
	s.ensure(t, "/api/v1/namespaces", named(namespace))
	s.ensure(t, "/api/v1/namespaces/"+namespace+"/serviceaccounts", named(account))
}

// Pod says what pod to create, and then which one that is.
type Pod struct {
	Namespace, Name string
	// ServiceAccount is "default" if it is empty.
	ServiceAccount string
	// Node is where the pod is bound to, if it is not empty.
	Node        string
	Labels      map[string]string
	Annotations map[string]string
	// Images are those of its containers c0, c1, …; one if there is none.
	Images []string
	// Signer is the one of its podCertificate volume, which it has if this is not empty.
	Signer string
	// UID is the API server's.
	UID string
}

// CreatePod creates a pod, and before it the namespace, service account and node
// that it names, if they are missing. Nothing runs it: Do with a PATCH of its status
// says what a kubelet would.
func (s *APIServer) CreatePod(t testing.TB, p Pod) Pod {
	t.Helper()
	if p.ServiceAccount == "" {
		p.ServiceAccount = "default"
	}
	s.ensureAccount(t, p.Namespace, p.ServiceAccount)
	if p.Node != "" {
		s.ensure(t, "/api/v1/nodes", named(p.Node))
	}
	p, err := s.createPod(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (s *APIServer) createPod(ctx context.Context, p Pod) (Pod, error) {
	if len(p.Images) == 0 {
		p.Images = []string{"example.org/app:1"}
	}
	containers := make([]object, len(p.Images))
	for i, image := range p.Images {
		containers[i] = object{"name": fmt.Sprint("c", i), "image": image}
	}
	var volumes []object
	if p.Signer != "" {
		source := object{"signerName": p.Signer, "keyType": "ECDSAP256", "credentialBundlePath": "bundle.pem"}
		volumes = []object{{"name": "certificate", "projected": object{"sources": []object{{"podCertificate": source}}}}}
	}
	var created struct {
		Metadata struct {
			UID string `json:"uid"`
		} `json:"metadata"`
	}
	err := s.Do(ctx, http.MethodPost, "/api/v1/namespaces/"+p.Namespace+"/pods", object{
		"metadata": object{"name": p.Name, "labels": p.Labels, "annotations": p.Annotations},
		"spec":     object{"serviceAccountName": p.ServiceAccount, "nodeName": p.Node, "containers": containers, "volumes": volumes},
	}, &created)
	p.UID = created.Metadata.UID
	return p, err
}

// DeletePod deletes a pod at once, as if its node had confirmed it.
func (s *APIServer) DeletePod(t testing.TB, p Pod) {
	t.Helper()
	s.must(t, http.MethodDelete, "/api/v1/namespaces/"+p.Namespace+"/pods/"+p.Name, object{"gracePeriodSeconds": 0}, nil)
}

// Token returns a token of the pod's service account, bound to the pod (and its
// node) if it has a UID, as a projected volume holds it: for the audiences, or the
// API server itself if there is none. lifetime is ten minutes at least.
func (s *APIServer) Token(t testing.TB, p Pod, lifetime time.Duration, audiences ...string) string {
	t.Helper()
	spec := object{"audiences": audiences, "expirationSeconds": int64(lifetime.Seconds())}
	if p.UID != "" {
		spec["boundObjectRef"] = object{"apiVersion": "v1", "kind": "Pod", "name": p.Name, "uid": p.UID}
	}
	account := p.ServiceAccount
	if account == "" {
		account = "default"
	}
	var answer struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	s.must(t, http.MethodPost, "/api/v1/namespaces/"+p.Namespace+"/serviceaccounts/"+account+"/token", object{"spec": spec}, &answer)
	return answer.Status.Token
}

// Review is what the API server says of a token.
type Review struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	Error         string   `json:"error"`
	User          struct {
		Username string              `json:"username"`
		UID      string              `json:"uid"`
		Groups   []string            `json:"groups"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

// Review asks the API server about a token, for these audiences. That of a deleted
// pod passes for some ten seconds, which is how long the API server remembers its
// own answers.
func (s *APIServer) Review(t testing.TB, token string, audiences ...string) Review {
	t.Helper()
	var answer struct {
		Status Review `json:"status"`
	}
	s.must(t, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", object{"spec": object{"token": token, "audiences": audiences}}, &answer)
	return answer.Status
}

// Requests returns how many requests the API server has answered since its start,
// by verb and resource, such as "POST" and "tokenreviews".
func (s *APIServer) Requests(t testing.TB, verb, resource string) int {
	t.Helper()
	var text []byte
	s.must(t, http.MethodGet, "/metrics", nil, &text)
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var n float64
	for _, m := range families["apiserver_request_total"].GetMetric() {
		labels := map[string]string{}
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		if labels["verb"] == verb && labels["resource"] == resource {
			n += m.GetCounter().GetValue()
		}
	}
	return int(n)
}
