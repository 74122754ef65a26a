// Package awspca is the upstream CA that is an AWS Private CA. It makes the three calls
// of its API that are needed, signed with the credentials that AWS's own programs on
// this machine would use. It does not know what for an intermediate is used.
//
// A request for an intermediate:
//
//  1. DescribeCertificateAuthority says whether the CA is active, and how it signs
//  2. IssueCertificate is called with the template of a subordinate CA
//  3. GetCertificate is called until the certificate is there, which takes a second
//     or two
package awspca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

// DefaultTemplate makes CA certificates that can sign no further CA. It takes the
// subject and the names from the request.
const DefaultTemplate = "SubordinateCACertificate_PathLen0/V1"

// Waits between two looks for the certificate: the first, and the longest.
const (
	firstWait = 200 * time.Millisecond
	longWait  = 2 * time.Second
)

// Config says which CA.
type Config struct {
	// CertificateAuthority is the ARN of the CA.
	CertificateAuthority string `yaml:"certificate_authority_arn"`
	// Template is the name of the template, or its ARN; DefaultTemplate if "".
	Template string `yaml:"template"`
	// AssumeRole is the ARN of a role to take on for the calls; none if "".
	AssumeRole string `yaml:"assume_role_arn"`
	// Profile is that of the AWS configuration files; the environment's if "".
	Profile string `yaml:"profile"`
	// Endpoint is the address of the API, such as that of a VPC endpoint; the
	// region's own if "".
	Endpoint string `yaml:"endpoint"`
	// ServerCA is the path of the CA certificates of the endpoint; the system's if "".
	ServerCA string `yaml:"server_ca"`
}

// CA is an AWS Private CA. It may be called concurrently.
type CA struct {
	config   Config
	arn      arn
	template string
	endpoint string
}

// arn of a CA: arn:PARTITION:acm-pca:REGION:ACCOUNT:certificate-authority/ID.
type arn struct{ partition, region string }

var arnForm = regexp.MustCompile(`^arn:(aws[a-z-]*):acm-pca:([a-z0-9-]+):[0-9]{12}:certificate-authority/[-0-9a-zA-Z]+$`)

// New checks the settings.
func New(c Config) (*CA, error) {
	parts := arnForm.FindStringSubmatch(c.CertificateAuthority)
	if parts == nil {
		return nil, fmt.Errorf("certificate_authority_arn: %.200q is not the ARN of a private CA; write the one that `aws acm-pca list-certificate-authorities` prints", c.CertificateAuthority)
	}
	s := &CA{config: c, arn: arn{partition: parts[1], region: parts[2]}, template: c.Template, endpoint: c.Endpoint}
	if s.template == "" {
		s.template = DefaultTemplate
	}
	if !strings.HasPrefix(s.template, "arn:") {
		s.template = "arn:" + s.arn.partition + ":acm-pca:::template/" + s.template
	}
	// Those that the API knows for CAs below a CA are all called so.
	if !strings.Contains(s.template, "SubordinateCACertificate") {
		return nil, fmt.Errorf("template: %.200q is not one for the certificates of CAs; write %s, or another with SubordinateCACertificate in its name", c.Template, DefaultTemplate)
	}
	if !strings.HasPrefix(s.template, "arn:"+s.arn.partition+":") {
		return nil, fmt.Errorf("template: %.200q is of another partition than the CA, which is in %s; write its name alone", c.Template, s.arn.partition)
	}
	if s.endpoint == "" {
		suffix := "amazonaws.com"
		if s.arn.partition == "aws-cn" {
			suffix += ".cn"
		}
		s.endpoint = "https://acm-pca." + s.arn.region + "." + suffix
	}
	u, ok := upstream.ParseAddress(s.endpoint, false)
	if !ok {
		return nil, fmt.Errorf("endpoint: %.100q is not the address of an API; write https://host", c.Endpoint)
	}
	s.endpoint = u.String()
	if c.AssumeRole != "" && !strings.HasPrefix(c.AssumeRole, "arn:") {
		return nil, fmt.Errorf("assume_role_arn: %.100q is not the ARN of a role", c.AssumeRole)
	}
	if c.ServerCA != "" {
		if _, err := upstream.ReadCertificates(c.ServerCA); err != nil {
			return nil, fmt.Errorf("server_ca: %w", err)
		}
	}
	return s, nil
}

// Capabilities are those of the template. Lives are counted in seconds, as they are
// asked for by their end.
func (*CA) Capabilities() upstream.Capabilities {
	return upstream.Capabilities{PathLen0: true, KeyTypes: []x509.PublicKeyAlgorithm{x509.RSA, x509.ECDSA}}
}

// Mint has an intermediate signed.
func (s *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	api, done, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	algorithm, err := s.describe(ctx, api)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(r.CSR)
	var issued struct {
		CertificateArn string
	}
	if err := api.call(ctx, "IssueCertificate", map[string]any{
		"CertificateAuthorityArn": s.config.CertificateAuthority,
		// A []byte is base64 in JSON, as the API wants it; what it holds is PEM.
		"Csr":              pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}),
		"SigningAlgorithm": algorithm,
		"TemplateArn":      s.template,
		"Validity":         map[string]any{"Type": "ABSOLUTE", "Value": time.Now().Add(r.TTL).Unix()},
		// The same request within five minutes gets the same certificate.
		"IdempotencyToken": hex.EncodeToString(sum[:16]),
	}, &issued); err != nil {
		return nil, err
	}
	return s.await(ctx, api, issued.CertificateArn)
}

// describe returns the algorithm with which the CA signs.
func (s *CA) describe(ctx context.Context, api *api) (algorithm string, _ error) {
	var d struct {
		CertificateAuthority struct {
			Status                            string
			CertificateAuthorityConfiguration struct{ SigningAlgorithm string }
		}
	}
	if err := api.call(ctx, "DescribeCertificateAuthority", map[string]any{"CertificateAuthorityArn": s.config.CertificateAuthority}, &d); err != nil {
		return "", err
	}
	if status := d.CertificateAuthority.Status; status != "ACTIVE" {
		return "", fmt.Errorf("%w: the private CA is %.40q, not ACTIVE: look at it in AWS", upstream.ErrDenied, status)
	}
	algorithm = d.CertificateAuthority.CertificateAuthorityConfiguration.SigningAlgorithm
	if algorithm == "" {
		return "", errors.New("the AWS Private CA does not say how it signs")
	}
	return algorithm, nil
}

// await returns the certificate once it has been made.
func (s *CA) await(ctx context.Context, api *api, certificate string) (*upstream.Minted, error) {
	if certificate == "" {
		return nil, errors.New("the answer of the AWS Private CA names no certificate")
	}
	for wait := firstWait; ; wait = min(2*wait, longWait) {
		var got struct{ Certificate, CertificateChain string }
		err := api.call(ctx, "GetCertificate", map[string]any{
			"CertificateAuthorityArn": s.config.CertificateAuthority, "CertificateArn": certificate,
		}, &got)
		if errors.Is(err, errInProgress) {
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("%w: the AWS Private CA has not made the certificate yet: %w", upstream.ErrUnavailable, context.Cause(ctx))
			case <-time.After(wait): // nothing tells when it is there
				continue
			}
		}
		if err != nil {
			return nil, err
		}
		signed, err := upstream.ParseChain(1, got.Certificate)
		if err == nil && len(signed) != 1 {
			err = errors.New("there is none")
		}
		if err != nil {
			return nil, fmt.Errorf("the certificate from the AWS Private CA: %w", err)
		}
		others, err := upstream.ParseChain(2*upstream.MaxChain, got.CertificateChain)
		if err != nil {
			return nil, fmt.Errorf("the chain from the AWS Private CA: %w", err)
		}
		return upstream.Arrange(signed[0], others), nil
	}
}

// api makes calls with one set of credentials.
type api struct {
	rest     *upstream.REST
	endpoint string
}

// connect looks for credentials, in the order of AWS's own programs: environment,
// token of a Kubernetes service account, configuration files, container, machine.
func (s *CA) connect(ctx context.Context) (_ *api, done func(), _ error) {
	options := []func(*config.LoadOptions) error{config.WithRegion(s.arn.region)}
	if s.config.Profile != "" {
		options = append(options, config.WithSharedConfigProfile(s.config.Profile))
	}
	settings, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: read the AWS configuration of this machine: %w", upstream.ErrDenied, err)
	}
	if s.config.AssumeRole != "" {
		settings.Credentials = aws.NewCredentialsCache(stscreds.NewAssumeRoleProvider(sts.NewFromConfig(settings), s.config.AssumeRole))
	}
	client, done, err := upstream.Client(s.config.ServerCA, nil)
	if err != nil {
		return nil, nil, err
	}
	client.Transport = &signing{next: client.Transport, credentials: settings.Credentials, region: s.arn.region}
	return &api{
		rest:     &upstream.REST{Client: client, Name: "AWS Private CA", Said: said},
		endpoint: s.endpoint,
	}, done, nil
}

// said reads the kind and the message of an error. The kind may have a namespace
// before it.
func said(body []byte) string {
	var e struct {
		Type    string `json:"__type"`
		Message string `json:"message"`
		Older   string `json:"Message"`
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	kind := e.Type[strings.LastIndexByte(e.Type, '#')+1:]
	return kind + ": " + strings.Join(strings.Fields(e.Message+" "+e.Older), " ")
}

// errInProgress is wrapped while a certificate has not been made.
var errInProgress = errors.New("the certificate is being made")

// call calls one action. Errors are as those of CA.Mint.
func (a *api) call(ctx context.Context, action string, in, out any) error {
	err := a.rest.Call(ctx, http.MethodPost, a.endpoint+"/", http.Header{
		"X-Amz-Target": {"ACMPrivateCA." + action},
		"Content-Type": {"application/x-amz-json-1.1"},
	}, in, out)
	answer, ok := errors.AsType[*upstream.StatusError](err)
	if !ok {
		return err
	}
	// Nearly all errors have the status 400.
	kind, _, _ := strings.Cut(answer.Said, ":")
	switch kind {
	case "RequestInProgressException":
		return fmt.Errorf("%w: %w", errInProgress, answer)
	case "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded":
		return &upstream.RateLimitError{Err: answer}
	case "ServiceUnavailable", "ServiceUnavailableException", "InternalFailure", "InternalServerException", "RequestExpired", "ExpiredTokenException":
		return fmt.Errorf("%w: %w", upstream.ErrUnavailable, answer)
	case "RequestFailedException":
		return answer // this request failed; another may not
	}
	return err
}

// maxBody bounds what is signed: requests are ours, and small.
const maxBody = 64 << 10

// minSecret is the least length of a secret access key; those of AWS have 40
// characters. The FIPS 140-3 module does not sign with shorter ones.
const minSecret = 16

// signing is a transport that signs requests (AWS Signature Version 4).
type signing struct {
	next        http.RoundTripper
	credentials aws.CredentialsProvider
	region      string
}

// RoundTrip implements http.RoundTripper.
func (s *signing) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err := errors.Join(err, r.Body.Close()); err != nil {
		return nil, err
	}
	who, err := s.credentials.Retrieve(r.Context())
	if err != nil {
		return nil, fmt.Errorf("find credentials for AWS: %w", err)
	}
	if len(who.SecretAccessKey) < minSecret {
		return nil, errors.New("the secret access key for AWS is too short to be one")
	}
	sum := sha256.Sum256(body)
	signed := r.Clone(r.Context())
	signed.Body = io.NopCloser(bytes.NewReader(body))
	if err := v4.NewSigner().SignHTTP(r.Context(), who, signed, hex.EncodeToString(sum[:]), "acm-pca", s.region, time.Now()); err != nil {
		return nil, fmt.Errorf("sign the request: %w", err)
	}
	return s.next.RoundTrip(signed)
}
