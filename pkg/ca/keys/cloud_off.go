//go:build !cloudkms

package keys

// They are in programs that are built with the tag cloudkms: the libraries of the
// three weigh 9 MB.
var openAWS, openGCP, openAzure func(target) (session, error)
