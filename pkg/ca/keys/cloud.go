//go:build cloudkms

package keys

import (
	"context"
	"errors"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/awskms"
	"go.step.sm/crypto/kms/azurekms"
	"go.step.sm/crypto/kms/cloudkms"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func openAWS(t target) (session, error) {
	m, err := awskms.New(context.Background(), apiv1.Options{Type: apiv1.AmazonKMS, URI: t.uri.String()})
	if err != nil {
		return nil, err
	}
	return manager{
		KeyManager: m,
		nameOf:     func(name string) string { return "awskms:name=meshid-" + name },
		absent: func(err error) bool {
			_, ok := errors.AsType[*types.NotFoundException](err)
			return ok
		},
	}, nil
}

// openGCP opens a key ring, such as projects/p/locations/l/keyRings/r. Its keys are
// made in the HSM.
func openGCP(t target) (session, error) {
	u := ""
	if f := t.uri.Get("credentials-file"); f != "" {
		u = "cloudkms:credentials-file=" + f
	}
	m, err := cloudkms.New(context.Background(), apiv1.Options{Type: apiv1.CloudKMS, URI: u})
	if err != nil {
		return nil, err
	}
	ring := t.uri.Get("key-ring")
	return manager{
		KeyManager: m, level: apiv1.HSM,
		nameOf: func(name string) string { return "cloudkms:" + ring + "/cryptoKeys/" + name },
		absent: func(err error) bool { return status.Code(err) == codes.NotFound },
	}, nil
}

func openAzure(t target) (session, error) {
	m, err := azurekms.New(context.Background(), apiv1.Options{Type: apiv1.AzureKMS, URI: t.uri.String()})
	if err != nil {
		return nil, err
	}
	vault := t.uri.Get("vault")
	return manager{
		KeyManager: m,
		nameOf:     func(name string) string { return "azurekms:vault=" + vault + ";name=" + name },
		absent: func(err error) bool {
			answer, ok := errors.AsType[*azcore.ResponseError](err)
			return ok && answer.StatusCode == http.StatusNotFound
		},
	}, nil
}
